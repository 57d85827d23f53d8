"""Options of a search for a data-processing strategy."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Searcher = Literal["agent", "exhaustive", "random", "halving", "mcts", "hybrid"]
Metric = Literal["loss", "winrate"]
Sampler = Literal["stratified", "herding", "random", "centrality", "graph_cut"]
CONSENT = "rows may leave this machine"


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def _roles(text: str) -> Any:
    return field(default_factory=dict, metadata={"help": text})


@dataclass(kw_only=True)
class AutoDPConfig:
    """Options of `AutoDP` and ``mmhf autodp``. Data, model and output folder are given beside them."""

    space: Literal["teams", "ops"] = _option(
        "teams",
        "teams: the paper's four groups, 64 strategies; ops: single operators with bounded parameters.",
    )
    search: Searcher = _option(
        "agent",
        "agent (the paper), exhaustive, random, halving (successive), mcts, or hybrid (agent, then halving).",
    )
    num_strategies: int = _option(8, "Strategies of random, simulations of mcts.")
    max_rounds: int = _option(6, "Rounds of an agent at most.")
    prompt: Literal["json", "paper_zh"] = _option(
        "json", "How the agent is spoken to: a JSON protocol, or the published Chinese format."
    )
    agent: dict[str, Any] = _roles(
        "The agent, which never sees rows: kind: heuristic (rules, no model), openai (base_url, model) or "
        "transformers (model). Empty: heuristic."
    )
    clients: dict[str, Any] = _roles(
        "Language models that do see rows, by role (writer, optimizer, screener, scorer, judge, default): "
        "kind: openai or transformers with their arguments."
    )
    remote_data: str = _option(
        "",
        f"Rows go only to models on this machine unless this says, word for word: {CONSENT}.",
    )
    sample_ratio: float = _option(0.2, "Share of the training rows that strategies are tried on.")
    sampler: Sampler = _option(
        "stratified", "How they are chosen; centrality and graph_cut are the release's, which distort."
    )
    screening: Literal["off", "teacher", "column"] = _option(
        "off",
        "Which rows OPTIMIZE rewrites: off (all), teacher (a classifier learnt from the screener's "
        "labels), column.",
    )
    screening_column: str = _option("needs_work", "Column of labels (1: rewrite) for screening: column.")
    screening_labels: int = _option(1000, "Rows that the screener labels to teach the classifier.")
    num_dev: int = _option(400, "Held-out questions that strategies are compared on.")
    num_test: int = _option(400, "Held-out questions for the one report at the end.")
    num_anchors: int = _option(14, "Held-out rows that LESS measures influence on.")
    metric: Metric = _option(
        "winrate", "winrate (a judge compares answers) or loss (on held-out answers, no judge)."
    )
    early_stopping: bool = _option(True, "Stop judging a strategy that is below the best for sure (winrate).")
    level: float = _option(0.95, "Coverage of the intervals.")
    num_steps: int = _option(100, "Optimizer updates of a full training, the same for every strategy.")
    learning_rate: float = _option(1e-4, "Of the fine-tuning; the paper's 1e-5 is for lora_r 0.")
    batch_size: int = _option(32, "Rows of an update.")
    device_batch_size: int = _option(2, "Rows that a device takes at once.")
    max_length: int = _option(2560, "Tokens of a row.")
    max_new_tokens: int = _option(512, "Tokens of an answer that is judged (the paper: 2048).")
    lora_r: int = _option(16, "Rank of LoRA; 0 trains all weights, as the paper does.")
    num_synthetic: int = _option(2000, "Question-answer pairs that GENERATE writes during the search.")
    final_synthetic: int = _option(10000, "The same when the strategy is applied to all rows.")
    select: Literal["less", "deita"] = _option("less", "How SELECT values rows: LESS (the paper) or DEITA.")
    select_ratio: float = _option(0.5, "Share of rows that SELECT keeps.")
    less_checkpoints: int = _option(4, "Epochs of LESS' warm-up training; gradients are taken after each.")
    less_warmup: float = _option(0.05, "Share of rows that warm-up training sees.")
    projection_dim: int = _option(8192, "Dimensions that gradients are projected to.")
    min_tokens: int = _option(20, "CLEAN drops pairs shorter than this.")
    max_tokens: int = _option(2560, "CLEAN drops pairs longer than this.")
    final_seeds: int = _option(
        1, "Fresh seeds with which the winner and the raw data are trained for the report."
    )
    isolate: bool = _option(True, "Train in a process of its own; off, in this one (faster for tiny models).")
    workers: int = _option(1, "Trainings side by side; with several GPUs each worker takes one.")
    launch: str = _option("", "Further words for accelerate launch, such as --num_processes 4.")
    use_cpu: bool = _option(False, "Leave a GPU alone.")
    reuse: bool = _option(True, "Use the cache of tables, evaluations and answers of language models.")
    num_proc: int = _option(1, "Processes of row-wise operators.")
    seed: int = _option(42, "Of everything.")

    def __post_init__(self) -> None:
        wrong = []
        for name, allowed in (
            ("space", ("teams", "ops")),
            ("search", get_args(Searcher)),
            ("prompt", ("json", "paper_zh")),
            ("sampler", get_args(Sampler)),
            ("screening", ("off", "teacher", "column")),
            ("metric", get_args(Metric)),
            ("select", ("less", "deita")),
        ):
            if getattr(self, name) not in allowed:
                wrong.append(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        for name in (
            "num_strategies",
            "max_rounds",
            "screening_labels",
            "num_dev",
            "num_test",
            "num_anchors",
            "num_steps",
            "batch_size",
            "device_batch_size",
            "max_length",
            "max_new_tokens",
            "less_checkpoints",
            "projection_dim",
            "final_seeds",
            "workers",
            "num_proc",
        ):
            if getattr(self, name) < 1:
                wrong.append(f"{name} must be >= 1; got {getattr(self, name)}")
        for name in ("lora_r", "num_synthetic", "final_synthetic", "min_tokens"):
            if getattr(self, name) < 0:
                wrong.append(f"{name} must be >= 0; got {getattr(self, name)}")
        for name in ("sample_ratio", "select_ratio", "less_warmup"):
            if not 0 < getattr(self, name) <= 1:
                wrong.append(
                    f"{name} must lie in (0, 1]; got {getattr(self, name)}. It is a share: 0.2 is a fifth"
                )
        if not 0 < self.level < 1:
            wrong.append(f"level must lie in (0, 1); got {self.level}. Write 0.95 for 95 %")
        if not self.learning_rate > 0:
            wrong.append(f"learning_rate must be > 0; got {self.learning_rate}")
        if self.max_tokens < self.min_tokens:
            wrong.append(f"max_tokens must be >= min_tokens; got {self.max_tokens} and {self.min_tokens}")
        if self.remote_data not in ("", CONSENT):
            wrong.append(f"remote_data must be empty or {CONSENT!r}; got {self.remote_data!r}")
        if self.metric == "winrate" and not {"judge", "default"} & set(self.clients):
            wrong.append("metric='winrate' needs clients: {judge: ...}; metric='loss' needs no judge")
        if self.screening == "teacher" and not {"screener", "default"} & set(self.clients):
            wrong.append(
                "screening='teacher' needs clients: {screener: ...}; screening='off' rewrites all rows"
            )
        if self.workers > 1 and not self.isolate:
            wrong.append(f"workers={self.workers} needs isolate=True: one process trains one model")
        if wrong:
            raise ValueError("AutoDPConfig: " + " | ".join(wrong) + ".")
