"""Options of a search, and of the command's recipe."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

Method = Literal["hpn", "released", "uniform", "fedex", "random", "tpe", "default"]
PolicyName = Literal["categorical", "beta"]
RewardName = Literal["client", "global"]
Judged = Literal["local", "aggregate"]
Reference = Literal["paired", "anchor"]
BaselineName = Literal["ema", "none"]
EncoderName = Literal["rff", "rff-median", "frozen-features", "histogram"]
Store = Literal["all", "every_n", "diff"]
StoreDtype = Literal["float32", "float16", "bfloat16"]


@dataclass(kw_only=True)
class HPNConfig:
    """Options of HPN and of the rivals that run through the same command."""

    method: Method = field(
        default="hpn",
        metadata={
            "help": "hpn: ours. released: the authors' policy, reward and loss, whose probabilities stay "
            "uniform. uniform: uniform search with the same regression. fedex, random, tpe: rivals that give "
            "all clients one config (tpe needs optuna). default: the anchor's config."
        },
    )
    policy: PolicyName = field(
        default="categorical",
        metadata={
            "help": "categorical: ranges are cut into a grid. beta: places in a range (released: its clamped "
            "Gaussian)."
        },
    )
    reward: RewardName = field(
        default="client",
        metadata={
            "help": "client: each client is rewarded by its own gain. global: all by the weighted mean (the "
            "release)."
        },
    )
    judged: Judged = field(
        default="local",
        metadata={
            "help": "Whose accuracy is the gain: local, the client's model before averaging; aggregate, the "
            "average's (the release)."
        },
    )
    reference: Reference = field(
        default="paired",
        metadata={
            "help": "What a gain is measured from: paired, the default config on the same batches from the "
            "same start; anchor, the start itself (the release)."
        },
    )
    baseline: BaselineName = field(
        default="ema",
        metadata={
            "help": "ema: subtract a moving mean by client and part of the trajectory, divide by its spread. "
            "none: raw gains."
        },
    )
    metric: str = field(
        default="accuracy",
        metadata={"help": "Figure of a client's evaluation; larger is better, unless its name holds 'loss'."},
    )
    num_rounds: int = field(
        default=400, metadata={"help": "Rounds R of the anchor run and of the deployed training."}
    )
    num_steps: int = field(default=4000, metadata={"help": "Steps of the search, one round each."})
    cohort_size: int = field(default=0, metadata={"help": "Clients in a step of the search; 0: all of them."})
    learning_rate: float = field(
        default=3e-3, metadata={"help": "Adam's learning rate of the policy (the release: 1e-3)."}
    )
    weight_decay: float = field(default=1e-4, metadata={"help": "Adam's weight decay of the policy."})
    max_grad_norm: float = field(
        default=1.0, metadata={"help": "Bound on the policy's gradient norm (the release: 10, once)."}
    )
    entropy_weight: float = field(
        default=0.3, metadata={"help": "Weight of the entropy bonus at the start of the search."}
    )
    final_entropy_weight: float = field(
        default=0.05, metadata={"help": "Weight of the entropy bonus at the end; linear between."}
    )
    num_buckets: int = field(
        default=5, metadata={"help": "Parts of the trajectory with a baseline of their own."}
    )
    surrogate: bool = field(
        default=True,
        metadata={
            "help": "Choose final configs by a ridge regression over all trials; False: the policy's mode."
        },
    )
    ridge: float = field(
        default=4.0,
        metadata={"help": "Noise variance over prior variance of the regression; larger believes less."},
    )
    patience: int = field(
        default=200,
        metadata={"help": "Stop when the policy's mode has not changed for so many steps; 0: never."},
    )
    encoder: EncoderName = field(
        default="rff",
        metadata={
            "help": "What a client tells about its data: rff (the paper), rff-median, frozen-features, "
            "histogram."
        },
    )
    num_features: int = field(default=6, metadata={"help": "Features per label of the encoding; even (rff)."})
    bandwidth: float = field(
        default=127.0, metadata={"help": "Kernel bandwidth of rff; rff-median finds its own."}
    )
    encoding_epsilon: float | None = field(
        default=3.0,
        metadata={
            "help": "Epsilon of a client's encoding; None: encoding_noise_multiplier says how much noise."
        },
    )
    encoding_noise_multiplier: float = field(
        default=0.1,
        metadata={"help": "Used without encoding_epsilon; 0.1 is the release's, epsilon 92. 0: no noise."},
    )
    reward_noise_multiplier: float = field(
        default=0.0,
        metadata={
            "help": "Noise on each reported accuracy over its sensitivity 1 / n_val; 0: accuracies leave the "
            "client as they are and have no epsilon."
        },
    )
    delta: float = field(default=1e-5, metadata={"help": "Delta at which epsilons are reported."})
    store: Store = field(
        default="all",
        metadata={
            "help": "Anchors kept: all, every_n (the search starts at those only), or diff: all, as "
            "compressed differences, bit-exact."
        },
    )
    store_every: int = field(default=10, metadata={"help": "n of every_n."})
    store_dtype: StoreDtype = field(
        default="float32", metadata={"help": "Precision of stored anchors; below float32 starts are rounded."}
    )
    save_every: int = field(
        default=10, metadata={"help": "Steps of the search between saved states; lost steps are repeated."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of starts, proposals, batches and networks."})

    def __post_init__(self) -> None:
        wrong = []
        for name, choices in (
            ("method", Method),
            ("policy", PolicyName),
            ("reward", RewardName),
            ("judged", Judged),
            ("reference", Reference),
            ("baseline", BaselineName),
            ("encoder", EncoderName),
            ("store", Store),
            ("store_dtype", StoreDtype),
        ):
            if getattr(self, name) not in get_args(choices):
                wrong.append(
                    f"{name} must be one of {', '.join(get_args(choices))}; got {getattr(self, name)!r}."
                )
        for name in ("num_rounds", "num_steps", "num_buckets", "store_every", "save_every"):
            if getattr(self, name) < 1:
                wrong.append(f"{name} must be >= 1; got {getattr(self, name)}.")
        for name in ("learning_rate", "max_grad_norm", "ridge", "bandwidth"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                wrong.append(f"{name} must be a finite number > 0; got {getattr(self, name)}.")
        for name in (
            "weight_decay",
            "entropy_weight",
            "final_entropy_weight",
            "encoding_noise_multiplier",
            "reward_noise_multiplier",
            "cohort_size",
            "patience",
        ):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                wrong.append(f"{name} must be a finite number >= 0; got {getattr(self, name)}.")
        if self.encoding_epsilon is not None and not self.encoding_epsilon > 0:
            wrong.append(f"encoding_epsilon must be > 0 or None; got {self.encoding_epsilon}.")
        if not 0 < self.delta < 1:
            wrong.append(f"delta must lie in (0, 1); got {self.delta}.")
        if self.encoder.startswith("rff") and (self.num_features < 2 or self.num_features % 2):
            wrong.append(f"num_features must be even and >= 2 with {self.encoder}; got {self.num_features}.")
        elif self.num_features < 1:
            wrong.append(f"num_features must be >= 1; got {self.num_features}.")
        if self.method in ("fedex", "uniform") and self.policy != "categorical":
            wrong.append(f"method={self.method!r} searches a grid; it needs policy='categorical'.")
        if wrong:
            raise ValueError("HPNConfig: " + " | ".join(wrong))


@dataclass(kw_only=True)
class TaskConfig:
    """Where the command's clients come from."""

    task: str = field(
        default="synthetic",
        metadata={
            "help": "synthetic, images (IDX or nothing else), text (JSON lines, MiniLM features), or "
            "module:function that returns a Federation."
        },
    )
    task_args: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Keyword arguments of the task."}
    )
    space: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Hyper-parameters: ours, FederatedScope's or a ConfigSpace file's form; see Run."},
    )
    grid_size: int = field(default=10, metadata={"help": "Values that a range is cut into on a grid."})
    grid_kind: Literal["inclusive", "released"] = field(
        default="inclusive", metadata={"help": "released: as the release cuts, without the upper end."}
    )
    output_dir: str = field(
        default="work_dirs/hpn", metadata={"help": "Folder of anchors, states and results."}
    )


def read_recipe(content: Mapping[str, Any]) -> tuple[HPNConfig, TaskConfig]:
    """Options of a recipe's two dataclasses.

    Raises:
        ValueError: If a key is unknown.
    """
    names = {kind: {f.name for f in fields(kind)} for kind in (HPNConfig, TaskConfig)}
    unknown = set(content) - names[HPNConfig] - names[TaskConfig]
    if unknown:
        known = ", ".join(sorted(names[HPNConfig] | names[TaskConfig]))
        raise ValueError(f"the recipe has unknown keys {', '.join(sorted(unknown))}; it takes {known}.")
    parts = [{k: v for k, v in content.items() if k in names[kind]} for kind in (HPNConfig, TaskConfig)]
    return HPNConfig(**parts[0]), TaskConfig(**parts[1])
