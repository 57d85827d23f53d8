"""Options of GradPruner and of its command."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

METHODS = ("gradpruner", "reverse", "random", "block_influence", "laco", "magnitude")


def _note(text: str) -> dict[str, Any]:
    return {"help": text}


def _choice(name: str, value: Any, known: tuple[Any, ...]) -> list[str]:
    return [] if value in known else [f"{name} must be one of {', '.join(known)}; got {value!r}."]


@dataclass(kw_only=True)
class GradPrunerConfig:
    """Options of GradPruner."""

    num_steps: float = field(
        default=40,
        metadata=_note("Optimizer steps whose gradients are scored; below 1 it is a share of the whole run."),
    )
    estimator: Literal["product", "first_order", "exact"] = field(
        default="product",
        metadata=_note(
            "Gradient of a weight: `product` g_B g_A (paper), `first_order` g_B A + B g_A - g_B g_A, "
            "`exact` the true one, not clipped (one process, no accumulation)."
        ),
    )
    score: Literal["squared", "fro"] = field(
        default="squared", metadata=_note("Sum of squared norms (paper) or of norms (the authors' code).")
    )
    normalize: Literal["none", "params"] = field(
        default="none",
        metadata=_note("Divide a layer's score by its scored entries (`params`) or not (paper)."),
    )
    history: Literal["memory", "disk", "scores"] = field(
        default="memory",
        metadata=_note(
            "Where factors for merging stay: `memory`, `disk`, or `scores`: nowhere; merging then needs a "
            "second pass."
        ),
    )
    stop_after: bool = field(default=True, metadata=_note("End training when the last step is collected."))
    method: Literal["gradpruner", "reverse", "random", "block_influence", "laco", "magnitude"] = field(
        default="gradpruner",
        metadata=_note("What ranks layers; all but the first are baselines, which drop without gradients."),
    )
    n_prune: int | None = field(default=None, metadata=_note("Layers to drop; None: by `ratio`."))
    ratio: float | None = field(
        default=None,
        metadata=_note("Share of layers to drop, in [0, 1); None: 0.4 unless `n_prune` is given."),
    )
    n_merge: str | None = field(
        default=None,
        metadata=_note(
            "Dropped layers that are merged before: a number, `all`, or None: those beyond 10 of 32 layers "
            "(paper)."
        ),
    )
    layers: list[int] | None = field(
        default=None, metadata=_note("Exactly these layers go; None: the lowest-scored.")
    )
    protect: list[int] = field(
        default_factory=lambda: [0, -1], metadata=_note("Layers that never go; -1 is the last.")
    )
    keep: float = field(default=0.2, metadata=_note("Share of a donor's entries merged, in [0, 1]."))
    weighting: Literal["none", "importance"] = field(
        default="none",
        metadata=_note("Add a donor's entry whole (paper), or times F_donor / (F_donor + F_receiver)."),
    )
    plan_seed: int = field(default=0, metadata=_note("Seed of method `random` and of the plan's bootstrap."))

    def __post_init__(self) -> None:
        wrong = []
        if self.num_steps <= 0 or (self.num_steps > 1 and self.num_steps != int(self.num_steps)):
            wrong.append(f"num_steps must be a whole number >= 1 or a share in (0, 1); got {self.num_steps}.")
        if self.n_prune is not None and self.n_prune < 0:
            wrong.append(f"n_prune must be >= 0; got {self.n_prune}.")
        if self.ratio is not None and not 0.0 <= self.ratio < 1.0:
            wrong.append(f"ratio must lie in [0, 1); got {self.ratio}. It is a share: write 0.4 for 40 %.")
        if sum(value is not None for value in (self.n_prune, self.ratio, self.layers)) > 1:
            wrong.append("n_prune, ratio and layers exclude each other; give one.")
        if not 0.0 <= self.keep <= 1.0:
            wrong.append(f"keep must lie in [0, 1]; got {self.keep}. It is a share: write 0.2 for 20 %.")
        if self.n_merge not in (None, "all") and not str(self.n_merge).isdigit():
            wrong.append(f"n_merge must be a number >= 0, 'all' or None; got {self.n_merge!r}.")
        wrong += _choice("estimator", self.estimator, ("product", "first_order", "exact"))
        wrong += _choice("score", self.score, ("squared", "fro"))
        wrong += _choice("normalize", self.normalize, ("none", "params"))
        wrong += _choice("history", self.history, ("memory", "disk", "scores"))
        wrong += _choice("method", self.method, METHODS)
        wrong += _choice("weighting", self.weighting, ("none", "importance"))
        if wrong:
            raise ValueError("GradPrunerConfig: " + " | ".join(wrong))


Finetune = Literal["full", "lora", "none"]


@dataclass(kw_only=True)
class RunConfig:
    """Data, model and LoRA of the command; the rest are `GradPrunerConfig` and the fields of trl's
    `SFTConfig`."""

    model: str = field(
        metadata=_note("Model to shorten, safetensors: folder, hub name or package:NAME/FOLDER.")
    )
    train_file: str | None = field(default=None, metadata=_note("JSON lines to train on, plain or .gz."))
    eval_file: str | None = field(default=None, metadata=_note("JSON lines to evaluate on."))
    text_column: str = field(
        default="text", metadata=_note("Column of the text (of the answer, with a prompt).")
    )
    prompt_column: str | None = field(
        default=None, metadata=_note("Column of a prompt that carries no loss; causal models only.")
    )
    label_column: str | None = field(
        default=None,
        metadata=_note("Column of the class; makes it a classification. None: a causal language model."),
    )
    scores: str | None = field(default=None, metadata=_note("Folder that `score` wrote, for `apply`."))
    finetune: Finetune = field(
        default="full", metadata=_note("How `run` trains the short model: all weights, LoRA, or not at all.")
    )
    lora_r: int = field(default=8, metadata=_note("Rank of LoRA while scoring and for finetune=lora."))
    lora_alpha: int = field(default=32, metadata=_note("Scale of LoRA."))
    lora_dropout: float = field(default=0.0, metadata=_note("Dropout of LoRA, in [0, 1)."))
    score_learning_rate: float = field(
        default=1e-4, metadata=_note("Learning rate of the scoring run; the main run has its own.")
    )
    calibration_rows: int = field(
        default=64, metadata=_note("Training rows that block_influence and laco look at.")
    )

    def __post_init__(self) -> None:
        wrong = []
        if self.finetune not in get_args(Finetune):
            wrong.append(f"finetune must be full, lora or none; got {self.finetune!r}.")
        if self.prompt_column is not None and self.label_column is not None:
            wrong.append(
                "prompt_column and label_column exclude each other; a classifier reads text_column alone."
            )
        for name in ("lora_r", "lora_alpha", "calibration_rows"):
            if getattr(self, name) < 1:
                wrong.append(f"{name} must be >= 1; got {getattr(self, name)}.")
        if not 0.0 <= self.lora_dropout < 1.0:
            wrong.append(f"lora_dropout must lie in [0, 1); got {self.lora_dropout}.")
        if self.score_learning_rate <= 0:
            wrong.append(f"score_learning_rate must be > 0; got {self.score_learning_rate}.")
        if wrong:
            raise ValueError("RunConfig: " + " | ".join(wrong))
