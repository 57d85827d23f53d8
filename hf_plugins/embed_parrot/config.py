"""Options of the leak scanner."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Attack = Literal["bei", "bei_norm", "hei", "ridge", "parrot", "vocab"]
ATTACKS: tuple[str, ...] = get_args(Attack)


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(kw_only=True)
class LeakScanConfig:
    """Options of `scan` and ``mmhf leak-scan``."""

    layers: tuple[int, ...] = _option(
        (), "Cuts to attack: i is what layer i hands on, 0 the embeddings. Empty: every layer."
    )
    attacks: tuple[str, ...] = _option(
        ("bei", "bei_norm", "hei", "ridge", "vocab"),
        "Of bei (own head), bei_norm (own norm and head), hei (nearest embedding), ridge (linear map), "
        "parrot (trained inverter), vocab (exact matching, causal models).",
    )
    defences: tuple[str, ...] = _option(
        ("none",), "Short forms such as none, dct:window=8, gauss:0.5, dx:40@embedding, int8, permute."
    )
    num_test: int = _option(100, "Texts of each data set that are attacked; no attack is fitted on them.")
    num_calibrate: int = _option(50, "Texts that choose the penalty of ridge.")
    num_fit: int = _option(2000, "Texts at most that ridge and parrot are fitted on.")
    max_length: int = _option(64, "Tokens of a text, the rest is cut off.")
    batch_size: int = _option(16, "Texts run through the model at once.")
    vocab_tokens: int = _option(
        200, "Tokens that vocabulary matching recovers per layer; it is exact but dear."
    )
    shortlist: int = _option(
        50, "Candidates that ridge (else hei) hands to vocabulary matching; 0 tries all tokens at once."
    )
    seeds: tuple[int, ...] = _option((0,), "Seeds of trained attacks and of random defences.")
    parrot_steps: int = _option(1000, "Optimizer steps of a parrot.")
    parrot_batch: int = _option(16, "Texts in a step of a parrot.")
    parrot_lr: float = _option(1e-3, "Peak learning rate of a parrot.")
    parrot_layers: int = _option(2, "Layers of a parrot's decode model, a GPT-2 with fresh weights.")
    parrot_width: int = _option(128, "Its width; heads are 64 wide.")
    parrot_loss: Literal["cosine", "cosine_ce"] = _option(
        "cosine", "cosine (the paper) or cosine_ce (cross entropy over scaled cosines; usually stronger)."
    )
    parrot_causal: bool = _option(
        True, "Whether the parrot sees only earlier states, as the paper's GPT-2 does; off it sees all."
    )
    parrot_skip: bool = _option(
        False, "Add the ridge map as a skip connection, so that training starts there."
    )
    raw_last: bool = _option(
        True, "Attack the last layer before the final norm; off: after it, as last_hidden_state."
    )
    bootstrap: int = _option(1000, "Resamples of the 95 % intervals.")
    fail_above: float = _option(
        1.0, "Share of tokens recovered above which the scan counts as failed (exit code 1); 1 never fails."
    )

    def __post_init__(self) -> None:
        wrong = []
        unknown = [name for name in self.attacks if name not in ATTACKS]
        if unknown or not self.attacks:
            wrong.append(
                f"attacks must be some of {', '.join(ATTACKS)}; got {', '.join(self.attacks) or 'none'}."
            )
        if any(layer < 0 for layer in self.layers):
            wrong.append(f"layers must be >= 0; got {self.layers}. 0 is the embedding output.")
        if not self.defences:
            wrong.append("defences must name at least one; 'none' attacks the model as it is.")
        if not self.seeds:
            wrong.append("seeds must hold at least one number.")
        for name in (
            "num_test",
            "num_fit",
            "max_length",
            "batch_size",
            "vocab_tokens",
            "parrot_steps",
            "bootstrap",
        ):
            if getattr(self, name) < 1:
                wrong.append(f"{name} must be >= 1; got {getattr(self, name)}.")
        for name in ("num_calibrate", "shortlist"):
            if getattr(self, name) < 0:
                wrong.append(f"{name} must be >= 0; got {getattr(self, name)}.")
        if self.parrot_batch < 1 or self.parrot_layers < 1 or not self.parrot_lr > 0:
            wrong.append(
                "parrot_batch, parrot_layers and parrot_lr must be positive; got "
                f"{self.parrot_batch}, {self.parrot_layers}, {self.parrot_lr}."
            )
        if self.parrot_width < 64 or self.parrot_width % 64:
            wrong.append(f"parrot_width must be a multiple of 64; got {self.parrot_width}.")
        if self.parrot_loss not in ("cosine", "cosine_ce"):
            wrong.append(f"parrot_loss must be 'cosine' or 'cosine_ce'; got {self.parrot_loss!r}.")
        if not 0.0 <= self.fail_above <= 1.0:
            wrong.append(f"fail_above must lie in [0, 1]; got {self.fail_above}. It is a share: 0.1 is 10 %.")
        if wrong:
            raise ValueError("LeakScanConfig: " + " | ".join(wrong))
