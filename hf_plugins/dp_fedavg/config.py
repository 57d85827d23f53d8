"""Options of user-level DP-FedAvg with BLUR and LUS, and of a recipe that runs it."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, get_origin


@dataclass(kw_only=True)
class DPFedAvgConfig:
    """Options of the method: privacy of a round, BLUR, LUS."""

    target_epsilon: float | None = field(
        default=None,
        metadata={
            "help": "Budget of the whole run; the noise is computed from it. None: give noise_multiplier."
        },
    )
    noise_multiplier: float | None = field(
        default=None,
        metadata={
            "help": "Noise on the sum of updates over clipping_norm. None: give target_epsilon. 0 "
            "is no privacy, and the reported epsilon is infinite."
        },
    )
    delta: float | None = field(
        default=None,
        metadata={"help": "Delta of the guarantee. None: users ** -1.1, below one over the users."},
    )
    clipping_norm: float = field(
        default=0.2, metadata={"help": "S: bound on the norm of one user's whole update, and BLUR's radius."}
    )
    sampling: Literal["poisson", "fixed"] = field(
        default="poisson",
        metadata={
            "help": "Cohort of a round. poisson: each user independently with sample_rate; "
            "neighbours differ by one user more or less. fixed: exactly cohort_size users; neighbours "
            "replace one user, which the accountant charges as twice the sensitivity."
        },
    )
    sample_rate: float = field(
        default=0.1, metadata={"help": "Probability of a user per round (poisson), in (0, 1]."}
    )
    cohort_size: int = field(default=0, metadata={"help": "Users of a round (fixed)."})
    server_lr: float = field(default=1.0, metadata={"help": "Step size of the server; 1 is plain averaging."})
    blur: float = field(
        default=0.4,
        metadata={"help": "lambda of BLUR, the pull back of updates outside the ball of S. 0: off."},
    )
    blur_hinge: Literal["square", "norm"] = field(
        default="square",
        metadata={"help": "square: lambda/2 max(0, |d|^2 - S^2); norm: lambda/2 max(0, |d| - S)^2."},
    )
    proximal: float = field(
        default=0.0, metadata={"help": "mu of FedProx, for comparison; it pulls back everywhere. 0: off."}
    )
    keep_ratio: float = field(
        default=0.5, metadata={"help": "Share of the update's coordinates that LUS keeps, in (0, 1]. 1: off."}
    )
    lus_score: Literal["utility", "magnitude", "random"] = field(
        default="utility",
        metadata={
            "help": "Coordinates kept: largest |gradient x update| (LUS), largest |update|, or random ones."
        },
    )
    lus_scope: Literal["tensor", "global"] = field(
        default="tensor", metadata={"help": "Rank coordinates within each tensor, or over all."}
    )
    lus_gradient: Literal["last", "full"] = field(
        default="last",
        metadata={
            "help": "Gradient for LUS: of the last local step's batch (no extra pass), or of all the user's "
            "records at the final weights."
        },
    )
    noise_mode: Literal["central", "shares"] = field(
        default="central",
        metadata={
            "help": "central: the server adds the noise once. shares: each user adds its share, for "
            "use under secure aggregation; a single noisy update is then no protection by itself."
        },
    )
    missing_shares: Literal["top_up", "stop"] = field(
        default="top_up",
        metadata={
            "help": "When fewer shares come than planned: the server adds what lacks, or the run "
            "stops (fixed sampling only)."
        },
    )
    quantile: float | None = field(
        default=None,
        metadata={
            "help": "Let clipping_norm follow this quantile of the update norms, privately. None: "
            "it is fixed."
        },
    )
    quantile_lr: float = field(
        default=0.2, metadata={"help": "Step size of the quantile's geometric update."}
    )
    count_noise_std: float | None = field(
        default=None,
        metadata={"help": "Noise on the count that quantile needs. None: a twentieth of the expected users."},
    )
    secure: bool = field(
        default=False,
        metadata={"help": "Draw cohorts and noise from os.urandom: no seed exists, a resumed round differs."},
    )
    seed: int | None = field(
        default=None,
        metadata={
            "help": "Seed of cohorts, batches and noise; whoever knows it can take the noise off. "
            "None: 62 bits from the operating system, kept in secret.json of output_dir only."
        },
    )
    log_private_statistics: bool = field(
        default=False,
        metadata={
            "help": "Log cohort sizes, training loss, update norms and clip shares. They are "
            "functions of the users' data without noise, so no epsilon covers them."
        },
    )

    def __post_init__(self) -> None:
        wrong = [*self._wrong_privacy(), *self._wrong_method()]
        if wrong:
            raise ValueError("DPFedAvgConfig: " + " | ".join(wrong))

    def _wrong_privacy(self) -> list[str]:
        wrong = []
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            wrong.append(
                "give either target_epsilon or noise_multiplier; got "
                f"{self.target_epsilon} and {self.noise_multiplier}."
            )
        if self.target_epsilon is not None and not 0 < self.target_epsilon < math.inf:
            wrong.append(f"target_epsilon must be a finite number > 0; got {self.target_epsilon}.")
        if self.noise_multiplier is not None and not 0 <= self.noise_multiplier < math.inf:
            wrong.append(f"noise_multiplier must be a finite number >= 0; got {self.noise_multiplier}.")
        if self.delta is not None and not 0 < self.delta < 1:
            wrong.append(f"delta must lie in (0, 1); got {self.delta}. Take less than 1 / number of users.")
        if not self.clipping_norm > 0:
            wrong.append(f"clipping_norm must be > 0; got {self.clipping_norm}. It bounds one user's update.")
        if not 0 < self.sample_rate <= 1:
            wrong.append(
                f"sample_rate must lie in (0, 1]; got {self.sample_rate}. It is a share: 0.1 for 10 "
                "% of users."
            )
        if self.sampling == "fixed" and self.cohort_size < 1:
            wrong.append(
                f"sampling='fixed' needs cohort_size >= 1, the users of a round; got {self.cohort_size}."
            )
        if self.noise_mode == "shares" and self.quantile is not None:
            wrong.append(
                "quantile needs noise_mode='central': under secure aggregation no norm reaches the server."
            )
        if self.missing_shares == "stop" and (self.noise_mode, self.sampling) != ("shares", "fixed"):
            wrong.append(
                "missing_shares='stop' needs noise_mode='shares' and sampling='fixed': a Poisson "
                "cohort is smaller than expected every other round."
            )
        if math.isinf(self.clipping_norm) and (self.target_epsilon or self.noise_multiplier):
            wrong.append("an infinite clipping_norm bounds nothing; noise needs a finite one.")
        return wrong

    def _wrong_method(self) -> list[str]:
        wrong = [
            f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}."
            for name, known in _CHOICES.items()
            if getattr(self, name) not in known
        ]
        wrong += [
            f"{name} must be a finite number >= 0; got {getattr(self, name)}. 0 turns it off."
            for name in ("blur", "proximal")
            if not 0 <= getattr(self, name) < math.inf
        ]
        if not 0 < self.keep_ratio <= 1:
            wrong.append(
                f"keep_ratio must lie in (0, 1]; got {self.keep_ratio}. It is the share kept: 0.1 for 10 %."
            )
        if not 0 < self.server_lr < math.inf:
            wrong.append(f"server_lr must be a finite number > 0; got {self.server_lr}.")
        if self.quantile is not None and not 0 < self.quantile < 1:
            wrong.append(f"quantile must lie in (0, 1); got {self.quantile}. 0.5 is the median.")
        if not self.quantile_lr > 0:
            wrong.append(f"quantile_lr must be > 0; got {self.quantile_lr}.")
        if self.count_noise_std is not None and (self.quantile is None or not self.count_noise_std > 0):
            wrong.append(f"count_noise_std must be > 0 and needs quantile; got {self.count_noise_std}.")
        return wrong

    def delta_for(self, num_clients: int) -> float:
        """Delta of the guarantee with this many users."""
        return self.delta if self.delta is not None else min(0.5, float(num_clients) ** -1.1)

    def expected_users(self, num_clients: int) -> float:
        """m, the fixed denominator: users of an average round."""
        return self.sample_rate * num_clients if self.sampling == "poisson" else float(self.cohort_size)


_CHOICES: dict[str, tuple[str, ...]] = {
    "sampling": ("poisson", "fixed"),
    "blur_hinge": ("square", "norm"),
    "lus_score": ("utility", "magnitude", "random"),
    "lus_scope": ("tensor", "global"),
    "lus_gradient": ("last", "full"),
    "noise_mode": ("central", "shares"),
    "missing_shares": ("top_up", "stop"),
}


@dataclass(kw_only=True)
class RunConfig:
    """Task, users and length of a run; in a recipe beside ``dp:`` and ``local:``."""

    task: Literal["images", "characters", "text"] = field(
        metadata={
            "help": "images: IDX files of the MNIST family. characters: LEAF JSON, one user a "
            "speaker, next-character prediction. text: JSON lines with text and label, a pretrained encoder "
            "with LoRA."
        }
    )
    data: str = field(
        metadata={"help": "Folder (images, text) or file (characters) with the users' records."}
    )
    output_dir: str = field(metadata={"help": "Checkpoints, metrics.jsonl, report.json and the final model."})
    num_rounds: int = field(metadata={"help": "Rounds of the whole run."})
    num_clients: int = field(
        default=100, metadata={"help": "Users that images and text are split over; speakers are given."}
    )
    alpha: float = field(
        default=0.3,
        metadata={"help": "Dirichlet concentration of that split: 0.1 very skewed, 100 nearly uniform."},
    )
    model: str = field(
        default="cnn",
        metadata={
            "help": "mlp or cnn (images), gru (characters), or a folder or hub name of an encoder (text)."
        },
    )
    lora_rank: int = field(default=4, metadata={"help": "Rank of the LoRA adapters (text)."})
    max_length: int = field(default=32, metadata={"help": "Tokens of a text, or characters of a window."})
    max_records: int = field(default=0, metadata={"help": "Most records of a user; 0: all."})
    max_test_records: int = field(default=0, metadata={"help": "Most test records; 0: all."})
    group_size: int = field(
        default=1, metadata={"help": "Clients trained side by side in one batched computation (images only)."}
    )
    model_seed: int = field(
        default=0, metadata={"help": "Seed of split and initial weights; it is no secret."}
    )
    evaluate_every: int = field(default=1, metadata={"help": "Rounds between tests of the global model."})
    report_to: list[str] = field(
        default_factory=list, metadata={"help": "Trackers, as in TrainingArguments: tensorboard, wandb, ..."}
    )

    def __post_init__(self) -> None:
        wrong = []
        if self.task not in ("images", "characters", "text"):
            wrong.append(f"task must be images, characters or text; got {self.task!r}.")
        wrong += [
            f"{name} must be >= 1; got {getattr(self, name)}."
            for name in (
                "num_rounds",
                "num_clients",
                "max_length",
                "group_size",
                "evaluate_every",
                "lora_rank",
            )
            if getattr(self, name) < 1
        ]
        wrong += [
            f"{name} must be >= 0, 0 for all; got {getattr(self, name)}."
            for name in ("max_records", "max_test_records")
            if getattr(self, name) < 0
        ]
        if not self.alpha > 0:
            wrong.append(f"alpha must be > 0; got {self.alpha}.")
        if self.group_size > 1 and self.task != "images":
            wrong.append(f"group_size > 1 works with task='images' only; got task={self.task!r}.")
        if wrong:
            raise ValueError("RunConfig: " + " | ".join(wrong))


def parse_recipe(content: Mapping[str, Any]) -> tuple[RunConfig, DPFedAvgConfig, dict[str, Any]]:
    """A recipe's three parts: run, method (``dp``), options of local training (``local``).

    Args:
        content: Fields of `RunConfig`, and the mappings ``dp`` and ``local``.

    Raises:
        ValueError: If a key is unknown or missing, or a value out of range.
    """
    rest = dict(content)
    dp, local = (rest.pop(name, None) or {} for name in ("dp", "local"))
    for name, section in (("dp", dp), ("local", local)):
        if not isinstance(section, Mapping):
            raise ValueError(f"the recipe's section {name} must hold keys and values; got {section!r}.")
    _check_keys(RunConfig, rest, "the recipe")
    _check_keys(DPFedAvgConfig, dp, "the recipe's section dp")
    return RunConfig(**rest), DPFedAvgConfig(**dp), dict(local)


def _check_keys(options: type, given: Mapping[str, Any], where: str) -> None:
    known = {f.name: f for f in fields(options)}
    for name in given:
        if name not in known:
            near = get_close_matches(str(name), list(known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}."
            raise ValueError(f"{where} has the unknown key {name!r}; {hint}")
    for name, value in given.items():
        if not _fits(value, known[name].type):
            kind = getattr(known[name].type, "__name__", known[name].type)
            raise ValueError(
                f"{where}: {name} takes {kind}; got {value!r}. YAML reads 1e-3 as text: write 1.0e-3."
            )
    lacking = [
        name
        for name, f in known.items()
        if name not in given and f.default is MISSING and f.default_factory is MISSING
    ]
    if lacking:
        raise ValueError(f"{where} lacks {', '.join(lacking)}; every recipe must say so.")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of a recipe is of an option's type; choices and ranges are checked by the option."""
    if isinstance(kind, UnionType):
        return any(_fits(value, part) for part in kind.__args__)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    if kind in (bool, str):
        return isinstance(value, kind)
    return isinstance(value, list) if get_origin(kind) is list else kind is not NoneType or value is None


def flower_recipe(
    run_config: Mapping[str, Any], node_config: Mapping[str, Any] | None = None
) -> tuple[RunConfig, DPFedAvgConfig, dict[str, Any]]:
    """A recipe from the config of a Flower run: dotted keys, dashes for underscores, a node's own ``data``.

    Args:
        run_config: ``context.run_config``: the recipe's keys, sections as ``dp.blur``, lists as text with
            commas. Keys ``rounds.*`` are the strategy's and left out.
        node_config: ``context.node_config``; its ``data`` and ``model`` go before the run's.

    Returns:
        As `parse_recipe`.
    """
    content: dict[str, Any] = {"dp": {}, "local": {}}
    for key, value in run_config.items():
        section, _, name = key.replace("-", "_").rpartition(".")
        if section == "rounds":
            continue
        (content.setdefault(section, {}) if section else content)[name] = value
    content |= {name: (node_config or {})[name] for name in ("data", "model") if name in (node_config or {})}
    if isinstance(content.get("report_to"), str):
        content["report_to"] = [name for name in content["report_to"].split(",") if name]
    return parse_recipe(content)
