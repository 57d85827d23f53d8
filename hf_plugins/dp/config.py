"""Options of differentially private training, and of the command that trains from a recipe."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

GradSampleMode = Literal["auto", "ghost", "hooks"]
Unit = Literal["record", "user"]


@dataclass(kw_only=True)
class DPConfig:
    """Options of DP-SGD: the budget, the clipping norm, the unit of privacy, the source of randomness."""

    target_epsilon: float | None = field(
        default=None,
        metadata={
            "help": "Budget of the whole run; the noise is computed from it (PLD). None: give "
            "noise_multiplier."
        },
    )
    noise_multiplier: float | None = field(
        default=None,
        metadata={
            "help": "Noise standard deviation over max_grad_norm. None: give target_epsilon. 0 is no "
            "privacy, and the reported epsilon is infinite."
        },
    )
    delta: float | None = field(
        default=None, metadata={"help": "Delta of the guarantee. None: 1 / (10 x number of units)."}
    )
    max_grad_norm: float = field(
        default=1.0, metadata={"help": "Clipping norm of one unit's whole gradient (not TrainingArguments')."}
    )
    grad_sample_mode: GradSampleMode = field(
        default="auto",
        metadata={
            "help": "ghost: linear layers and embeddings give norms and clipped sums only; hooks: every "
            "layer gives gradients of each record; auto: ghost where it is exact (the log says which)."
        },
    )
    unit: Unit = field(
        default="record",
        metadata={"help": "What is protected: one record, or everything of one user."},
    )
    user_column: str | None = field(
        default=None, metadata={"help": "Column of train_dataset that names the user; with unit='user' only."}
    )
    max_records_per_user: int = field(
        default=1,
        metadata={"help": "Most records of a user in one step, drawn at random; with unit='user' only."},
    )
    spent_ledger: str | None = field(
        default=None,
        metadata={
            "help": "dp_ledger.json of an earlier run on the same data; its cost is added. None: first run."
        },
    )
    secure: bool = field(
        default=False,
        metadata={
            "help": "Draw noise and samples from os.urandom (no seed exists; slower). Else a seeded "
            "generator."
        },
    )
    seed: int | None = field(
        default=None,
        metadata={
            "help": "Seed of noise and sampling, for tests: whoever knows it can take the noise off again. "
            "None: 62 bits from the operating system."
        },
    )
    log_private_statistics: bool = field(
        default=False,
        metadata={
            "help": "Log training loss and share of clipped units. They are functions of the records without "
            "noise, so no epsilon covers them."
        },
    )

    def __post_init__(self) -> None:
        wrong = [*self._wrong_budget(), *self._wrong_unit()]
        if not (math.isfinite(self.max_grad_norm) and self.max_grad_norm > 0):
            wrong.append(f"max_grad_norm must be a finite number > 0; got {self.max_grad_norm}.")
        if self.grad_sample_mode not in get_args(GradSampleMode):
            wrong.append(
                f"grad_sample_mode must be one of {', '.join(get_args(GradSampleMode))}; "
                f"got {self.grad_sample_mode!r}."
            )
        if self.secure and self.seed is not None:
            wrong.append(
                f"secure=True has no seed; got seed={self.seed}. Drop one: a run that can be repeated is not "
                "secure."
            )
        if wrong:
            raise ValueError("DPConfig: " + " | ".join(wrong))

    def _wrong_budget(self) -> list[str]:
        wrong = []
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            wrong.append(
                "give either target_epsilon or noise_multiplier; got "
                f"target_epsilon={self.target_epsilon}, noise_multiplier={self.noise_multiplier}."
            )
        if self.target_epsilon is not None and not 0 < self.target_epsilon < math.inf:
            wrong.append(
                f"target_epsilon must be a finite number > 0; got {self.target_epsilon}. For training "
                "without privacy write noise_multiplier=0."
            )
        if self.noise_multiplier is not None and not 0 <= self.noise_multiplier < math.inf:
            wrong.append(f"noise_multiplier must be a finite number >= 0; got {self.noise_multiplier}.")
        if self.delta is not None and not 0 < self.delta < 1:
            wrong.append(f"delta must lie in (0, 1); got {self.delta}.")
        return wrong

    def _wrong_unit(self) -> list[str]:
        wrong = []
        if self.unit not in get_args(Unit):
            wrong.append(f"unit must be one of {', '.join(get_args(Unit))}; got {self.unit!r}.")
        if self.max_records_per_user < 1:
            wrong.append(f"max_records_per_user must be >= 1; got {self.max_records_per_user}.")
        if self.unit == "user" and self.user_column is None:
            wrong.append("unit='user' needs user_column, the column of train_dataset that names the user.")
        if self.unit == "record" and (self.user_column is not None or self.max_records_per_user != 1):
            wrong.append(
                "user_column and max_records_per_user act with unit='user' only; got unit='record'. With "
                "it a user of several records is protected less than epsilon says."
            )
        return wrong


@dataclass(kw_only=True)
class RunConfig:
    """What `mmhf dp run` trains: a model folder, a text data set, and how the two meet."""

    model: str = field(metadata={"help": "Folder or hub name of the model."})
    train_file: str = field(metadata={"help": "JSON-lines (or .gz) file with the private training records."})
    eval_file: str | None = field(
        default=None,
        metadata={
            "help": "JSON-lines file for evaluation, of data outside the guarantee; None: no evaluation."
        },
    )
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    label_column: str | None = field(
        default="label", metadata={"help": "Column with the class; None trains a causal language model."}
    )
    max_length: int = field(default=128, metadata={"help": "Tokens at which a text is cut."})
    lora_rank: int = field(
        default=0, metadata={"help": "Rank of LoRA adapters on all linear layers; 0 trains every parameter."}
    )

    def __post_init__(self) -> None:
        wrong = []
        if self.max_length < 2:
            wrong.append(f"max_length must be >= 2; got {self.max_length}.")
        if self.lora_rank < 0:
            wrong.append(f"lora_rank must be >= 0; got {self.lora_rank}. 0 trains every parameter.")
        if wrong:
            raise ValueError("RunConfig: " + " | ".join(wrong))
