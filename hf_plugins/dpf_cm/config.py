"""Options of the pipeline's recipe and of the vector database."""

from dataclasses import dataclass, field
from typing import Any, Literal

STAGES = ("cpt_data", "cpt", "sft_data", "sft", "preference_data", "rm", "denoise", "dpo", "ppvd")


def _option(default: Any, text: str) -> Any:
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(kw_only=True)
class PPVDConfig:
    """Options of the privacy-preserving vector database."""

    layer: int | None = _option(
        None, "Decoder layer whose output is the key, from 0; None is the middle one."
    )
    rouge_threshold: float = _option(
        0.85, "ROUGE-L of the model's answer with the private one above which a sample counts as memorised."
    )
    key_points: tuple[float, ...] = _option(
        (0.0, 0.25, 0.5, 0.75),
        "Where keys are made: after the prompt plus this share of the answer. The paper's literal "
        "reading is (1.0,).",
    )
    suffix_points: tuple[float, ...] = _option(
        (),
        "Extra keys of prompts that lost their beginning: shares of the prompt that are left, for "
        "example 0.6.",
    )
    whiten: bool = _option(
        True, "Take the benign mean and leading directions off the states before comparing; off is the paper."
    )
    num_directions: int = _option(3, "Principal directions of benign states that are removed.")
    threshold: float | None = _option(
        None, "Cosine above which a prompt matches; None calibrates it to max_fpr. The paper's is 0.8."
    )
    max_fpr: float = _option(0.01, "Share of benign prompts that may match.")
    min_tpr: float = _option(
        0.99, "Share of stored prompts that must match, else the guard refuses to start."
    )
    output_guard: Literal["block", "replace", "off"] = _option(
        "block",
        "What happens when generated text runs into a private answer: block the token that "
        "completes an n-gram, replace the whole answer, or nothing (the paper).",
    )
    ngram: int = _option(10, "Length of those n-grams, in tokens.")
    output_share: float = _option(
        0.3, "Share of an answer's n-grams that must be generated before `replace` replaces."
    )
    store: Literal["lancedb", "numpy", "qdrant"] = _option("lancedb", "Where keys are kept.")
    protect: Literal["none", "sketch", "encrypt"] = _option(
        "none",
        "How stored keys are protected: not at all, as a keyed sign sketch, or sealed with "
        "AES-256-GCM. Hidden states can be turned back into text.",
    )
    sketch_bits: int = _option(2048, "Bits of a sketch.")
    batch_size: int = _option(8, "Texts run through the model at once.")
    max_length: int = _option(2048, "Tokens of prompt and answer that are read.")

    def __post_init__(self) -> None:
        self.key_points, self.suffix_points = tuple(self.key_points), tuple(self.suffix_points)
        wrong = []
        for name in ("rouge_threshold", "min_tpr", "output_share"):
            if not 0 <= getattr(self, name) <= 1:
                wrong.append(
                    f"{name} must lie in [0, 1]; got {getattr(self, name)}. It is a share: write "
                    "0.85 for 85 %."
                )
        if not 0 <= self.max_fpr < 1:
            wrong.append(f"max_fpr must lie in [0, 1); got {self.max_fpr}. Write 0.01 for 1 %.")
        if not self.key_points or not all(0 <= point <= 1 for point in self.key_points):
            wrong.append(f"key_points must be shares in [0, 1], at least one; got {self.key_points}.")
        if not all(0 < point < 1 for point in self.suffix_points):
            wrong.append(f"suffix_points must be shares between 0 and 1; got {self.suffix_points}.")
        if self.output_guard not in ("block", "replace", "off"):
            wrong.append(f"output_guard must be block, replace or off; got {self.output_guard!r}.")
        if self.store not in ("lancedb", "numpy", "qdrant"):
            wrong.append(f"store must be lancedb, numpy or qdrant; got {self.store!r}.")
        if self.protect not in ("none", "sketch", "encrypt"):
            wrong.append(f"protect must be none, sketch or encrypt; got {self.protect!r}.")
        if self.ngram < 2:
            wrong.append(f"ngram must be >= 2; got {self.ngram}.")
        for name in ("sketch_bits", "batch_size", "max_length"):
            if getattr(self, name) < 1:
                wrong.append(f"{name} must be >= 1; got {getattr(self, name)}.")
        if self.num_directions < 0:
            wrong.append(f"num_directions must be >= 0; got {self.num_directions}.")
        if wrong:
            raise ValueError("PPVDConfig: " + " | ".join(wrong))


@dataclass(kw_only=True)
class RecipeConfig:
    """A recipe of `Pipeline`, as YAML holds it. Paths are relative to the recipe's file."""

    work_dir: str = _option("work_dirs/dpf_cm", "Where data, models, caches and the report go.")
    seed: int = _option(0, "Of everything that is drawn.")
    lang: Literal["zh", "en"] = _option("zh", "Language of the prompts to language models.")
    num_proc: int | None = _option(None, "Processes for row-wise operators.")
    max_row_bytes: int = _option(
        1_000_000, "Longer lines of a data file are put aside unread, with a record."
    )
    model: str | None = _option(
        None, "Folder of the base model; None trains a small one of `init_model` from scratch."
    )
    init_model: dict[str, Any] = _option(
        {"hidden_size": 128, "num_layers": 4, "vocabulary": 3000},
        "Size of that model; its tokenizer is learnt on the data.",
    )
    clients: dict[str, Any] = _option(
        {},
        "Language models by role (scorer, optimizer, writer, instructor, voter_1 ...; default "
        "serves the rest).",
    )
    cpt_sources: list[dict[str, Any]] = _option([], "Files of plain text for continued pre-training.")
    sft_sources: list[dict[str, Any]] = _option([], "Files of question-answer pairs or dialogues.")
    seed_sources: list[dict[str, Any]] = _option(
        [], "Files of scored (question, instruction) seeds for chained-example instructions."
    )
    preference_sources: list[dict[str, Any]] = _option(
        [], "Files of ready preference pairs; empty samples prompts from the SFT data and votes."
    )
    benign_sources: list[dict[str, Any]] = _option([], "Files of public prompts that calibrate the guard.")
    eval_files: list[str] = _option([], "Evaluation sets whose 13-grams are kept out of all training data.")
    eval_keys: list[str] = _option(
        ["question", "answer", "text"], "Columns of those files that are compared."
    )
    cpt_ops: list[Any] | None = _option(None, "Operators of the CPT data; None is the paper's list.")
    sft_ops: list[Any] | None = _option(None, "Operators of the SFT data; None is the paper's list.")
    preference_ops: list[Any] | None = _option(None, "Operators before denoising; None is the paper's list.")
    paper_order: bool = _option(
        False,
        "Strip markup after the filters, as the paper orders it, instead of before, where it cannot "
        "mislead them.",
    )
    perplexity_model: str | None = _option(
        None, "Folder of the model of the perplexity filter; None leaves it out."
    )
    num_examples: int = _option(3, "Examples in a chained prompt.")
    num_prompts: int = _option(6000, "Prompts whose responses are voted on, where pairs are generated.")
    num_reward_models: int = _option(5, "Reward models of the ensemble.")
    cross_fit: bool = _option(
        True,
        "Each reward model scores only the fold it was not trained on; off scores its own training "
        "rows (the paper).",
    )
    trim: tuple[float, float] = _option(
        (0.1, 0.1), "Shares of pairs removed with the smallest and the largest distance."
    )
    denoise_action: Literal["drop", "flip", "label_smooth"] = _option(
        "drop", "What happens to the smallest; the paper drops."
    )
    cpt: dict[str, Any] = _option({}, "Options of trl's SFTConfig for continued pre-training.")
    sft: dict[str, Any] = _option({}, "Options of trl's SFTConfig for fine-tuning.")
    rm: dict[str, Any] = _option({}, "Options of trl's RewardConfig.")
    dpo: dict[str, Any] = _option({}, "Options of trl's DPOConfig.")
    ppvd: dict[str, Any] = _option({}, "Options of PPVDConfig.")
    key_file: str | None = _option(
        None,
        "File of the 32 bytes that seal or sketch the guard's store (ppvd: protect); "
        "`mmhf dpf-cm ppvd key FILE` makes one. Keep it out of work_dir.",
    )
    num_search: int | None = _option(None, "Training samples tested for memorisation; None tests all.")
    safe_reply: str | None = _option(
        None, "A fixed safe answer instead of asking the client of the role `safe` for one a sample."
    )

    def __post_init__(self) -> None:
        wrong = []
        if self.lang not in ("zh", "en"):
            wrong.append(f"lang must be zh or en; got {self.lang!r}.")
        for name in ("num_examples", "num_reward_models", "num_prompts", "max_row_bytes"):
            if getattr(self, name) < 1:
                wrong.append(f"{name} must be >= 1; got {getattr(self, name)}.")
        if self.cross_fit and self.num_reward_models < 2:
            wrong.append(
                "cross_fit needs num_reward_models >= 2: each scores the fold it was not trained on."
            )
        self.trim = (float(self.trim[0]), float(self.trim[1])) if len(self.trim) == 2 else (-1.0, -1.0)
        if min(self.trim) < 0 or sum(self.trim) > 1:
            wrong.append(
                "trim must be two shares that sum to at most 1. Write [0.1, 0.1] for 10 % at either end."
            )
        if self.denoise_action not in ("drop", "flip", "label_smooth"):
            wrong.append(f"denoise_action must be drop, flip or label_smooth; got {self.denoise_action!r}.")
        if wrong:
            raise ValueError("RecipeConfig: " + " | ".join(wrong))
