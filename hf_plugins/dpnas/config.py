"""Options of the DPNAS search."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

Dataset = Literal["cifar10", "mnist", "fashion_mnist"]
Fifth = Literal["selu", "elu"]
Strategy = Literal["controller", "random"]

# Widths and classifier of the release, by data set.
SHAPES: dict[str, dict[str, object]] = {
    "cifar10": {
        "in_channels": 3,
        "image_size": 32,
        "num_labels": 10,
        "stem_channels": 48,
        "cell_channels": (48, 96, 192),
        "head_activation": "selu",
    },
    "mnist": {
        "in_channels": 1,
        "image_size": 28,
        "num_labels": 10,
        "stem_channels": 32,
        "cell_channels": (32, 32, 64),
        "head_activation": "tanh",
    },
}
SHAPES["fashion_mnist"] = SHAPES["mnist"]


@dataclass(kw_only=True)
class DPNASSearchConfig:
    """Options of `search`; defaults are the release's settings for CIFAR-10, except that the reward is
    private.
    """

    shape: Dataset = field(
        default="cifar10",
        metadata={"help": "Widths and image size of the network: those released for this data set."},
    )
    strategy: Strategy = field(
        default="controller",
        metadata={"help": "Who proposes cells: the trained controller, or uniform draws (the control)."},
    )
    space: Fifth = field(
        default="selu",
        metadata={
            "help": "Activation of operation 5; the released search lists elu, its final nets use selu."
        },
    )
    groups: int = field(
        default=4,
        metadata={"help": "Groups of GroupNorm while searching; the release takes 4 here, 8 in final nets."},
    )
    num_steps: int = field(default=12000, metadata={"help": "DP-SGD steps of the shared weights."})
    warmup_steps: int = field(
        default=2000,
        metadata={"help": "Steps at the start in which cells are drawn uniformly and no reward is read."},
    )
    reward_every: int = field(
        default=1, metadata={"help": "After the warm-up, weight steps between two controller steps."}
    )
    reward_split: float = field(
        default=0.4,
        metadata={"help": "Share of the records kept for rewards; the others train the weights, in (0, 1)."},
    )
    sample_rate: float = field(
        default=0.01,
        metadata={"help": "Probability of a record to be in a weight step (Poisson), in (0, 1]."},
    )
    noise_multiplier: float = field(
        default=0.8, metadata={"help": "Noise of a weight step, in units of max_grad_norm."}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "Bound of one record's gradient, L2."})
    learning_rate: float = field(
        default=0.02, metadata={"help": "Learning rate of the weights at the start."}
    )
    final_learning_rate: float = field(
        default=0.001, metadata={"help": "Learning rate of the weights at the end of the cosine."}
    )
    momentum: float = field(default=0.9, metadata={"help": "Momentum of the weights' SGD."})
    weight_decay: float = field(default=2e-4, metadata={"help": "Weight decay of the weights' SGD."})
    reward_sample_rate: float = field(
        default=0.0256,
        metadata={"help": "Probability of a reward record to be in one reward; 1 reads the whole split."},
    )
    reward_noise_multiplier: float = field(
        default=4.0,
        metadata={
            "help": "Noise on the count of right answers. 0, as in the release, gives no private cell."
        },
    )
    controller_learning_rate: float = field(
        default=3e-4, metadata={"help": "Adam's learning rate of the controller."}
    )
    entropy_weight: float = field(
        default=0.005, metadata={"help": "Weight of the entropy bonus in REINFORCE."}
    )
    num_candidates: int = field(
        default=10,
        metadata={
            "help": "Cells proposed at the end and scored on the reward split; the best is the result."
        },
    )
    delta: float = field(default=1e-5, metadata={"help": "Delta at which epsilon is reported."})
    chunk_size: int = field(default=64, metadata={"help": "Samples whose gradients are in memory at once."})
    save_steps: int = field(default=100, metadata={"help": "Weight steps between two saved states."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, batches, noise and proposals."})

    def __post_init__(self) -> None:
        wrong = []
        for name, choices in (("shape", Dataset), ("strategy", Strategy), ("space", Fifth)):
            if getattr(self, name) not in get_args(choices):
                wrong.append(
                    f"{name} must be one of {', '.join(get_args(choices))}; got {getattr(self, name)!r}."
                )
        for name in ("num_steps", "reward_every", "groups", "num_candidates", "chunk_size", "save_steps"):
            if getattr(self, name) < 1:
                wrong.append(f"{name} must be >= 1; got {getattr(self, name)}.")
        if not 0 <= self.warmup_steps <= self.num_steps:
            wrong.append(
                f"warmup_steps must lie in 0..num_steps ({self.num_steps}); got {self.warmup_steps}."
            )
        for name in ("sample_rate", "reward_sample_rate"):
            if not 0 < getattr(self, name) <= 1:
                wrong.append(f"{name} must lie in (0, 1]; got {getattr(self, name)}. It is a share.")
        for name in ("reward_split", "delta"):
            if not 0 < getattr(self, name) < 1:
                wrong.append(f"{name} must lie in (0, 1); got {getattr(self, name)}.")
        for name in ("max_grad_norm", "learning_rate", "controller_learning_rate"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                wrong.append(f"{name} must be a finite number > 0; got {getattr(self, name)}.")
        for name in (
            "noise_multiplier",
            "reward_noise_multiplier",
            "final_learning_rate",
            "momentum",
            "weight_decay",
            "entropy_weight",
        ):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                wrong.append(f"{name} must be a finite number >= 0; got {getattr(self, name)}.")
        if wrong:
            raise ValueError("DPNASSearchConfig: " + " | ".join(wrong))


@dataclass(kw_only=True)
class DPNASTrainConfig:
    """What `mmhf dpnas train` trains; budget and length of the run are options of DPConfig and
    TrainingArguments.
    """

    data: str = field(metadata={"help": "Folder with the images: IDX files (MNIST form) or Parquet."})
    preset: Dataset = field(
        default="mnist", metadata={"help": "Released widths, and cell unless cell_file is given."}
    )
    cell_file: str | None = field(
        default=None,
        metadata={"help": "search.json of a search whose cell is trained; None: the released cell."},
    )
    train_split: str = field(default="train", metadata={"help": "First letters of the training files."})
    eval_split: str | None = field(
        default="t10k", metadata={"help": "First letters of the evaluation files; None: no evaluation."}
    )
    limit: int | None = field(default=None, metadata={"help": "Use only so many training images; None: all."})
    momentum: float = field(default=0.9, metadata={"help": "Momentum of SGD."})

    def __post_init__(self) -> None:
        wrong = []
        if self.preset not in get_args(Dataset):
            wrong.append(f"preset must be one of {', '.join(get_args(Dataset))}; got {self.preset!r}.")
        if self.limit is not None and self.limit < 1:
            wrong.append(f"limit must be >= 1; got {self.limit}. Leave it out to use all images.")
        if not 0 <= self.momentum < 1:
            wrong.append(f"momentum must lie in [0, 1); got {self.momentum}.")
        if wrong:
            raise ValueError("DPNASTrainConfig: " + " | ".join(wrong))
