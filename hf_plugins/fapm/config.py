"""Options of FAPM."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

METHODS = ("fapm", "magnitude", "relative", "dare", "ties", "wise_ft")
DTYPES = ("float32", "bfloat16", "float16")


def _option(default: Any, text: str) -> Any:
    if isinstance(default, dict):
        return field(default_factory=dict, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(kw_only=True)
class FAPMConfig:
    """Options of `fapm_prune_checkpoint`, of `FAPMCallback` and of ``mmhf fapm``."""

    keep: float = _option(
        0.1, "Share of each tensor's entries that stay fine-tuned, in [0, 1]; WiSE-FT: alpha."
    )
    method: Literal["fapm", "magnitude", "relative", "dare", "ties", "wise_ft"] = _option(
        "fapm",
        "fapm, or to compare with: magnitude, relative, dare (random, rescaled), ties (magnitude over all "
        "tensors at once), wise_ft (interpolation).",
    )
    coefficient: float = _option(
        1.0, "Factor on the mean magnitude in the score; 1 is the paper, 0 magnitude."
    )
    scope: Literal["tensor", "global"] = _option(
        "tensor", "Whether keep counts in each tensor (the paper) or over all of them; ties is always global."
    )
    include: str | None = _option(
        None, "Regular expression searched in tensor names; others stay pre-trained. None: all tensors."
    )
    exclude: str | None = _option(None, "Regular expression of tensor names that stay pre-trained.")
    per_tensor: dict[str, float] = _option(
        {}, "Regular expression -> keep of the tensors it is found in; the first that fits wins."
    )
    out_dtype: Literal["float32", "bfloat16", "float16"] | None = _option(
        None, "Dtype of the float tensors written; None keeps that of the base model."
    )
    sidecar: bool = _option(
        False, "Write only the changes (fapm_sidecar.safetensors), to be added to the base and removed again."
    )
    seed: int = _option(0, "Of DARE's random choice.")
    chunk: int = _option(1 << 18, "Entries computed at once; memory grows with it, results do not change.")
    resident_mib: int = _option(
        64, "A tensor pair up to this size is read once and held; larger ones are read again for each pass."
    )
    sync: bool = _option(True, "Wait until the output is on the disk before it gets its name.")

    def __post_init__(self) -> None:
        wrong = []
        for name, keep in {
            "keep": self.keep,
            **{f"per_tensor[{k!r}]": v for k, v in self.per_tensor.items()},
        }.items():
            if not 0.0 <= keep <= 1.0:
                wrong.append(f"{name} must lie in [0, 1]; got {keep}. It is a share: write 0.1 for 10 %.")
        if self.method not in METHODS:
            wrong.append(f"method must be one of {', '.join(METHODS)}; got {self.method!r}.")
        if self.scope not in ("tensor", "global"):
            wrong.append(f"scope must be 'tensor' or 'global'; got {self.scope!r}.")
        if self.out_dtype not in (None, *DTYPES):
            wrong.append(f"out_dtype must be one of {', '.join(DTYPES)} or None; got {self.out_dtype!r}.")
        if self.is_global and self.per_tensor:
            wrong.append(
                "per_tensor has no meaning with a global keep; use include and exclude, or scope='tensor'."
            )
        if self.sidecar and self.method in ("wise_ft", "dare"):
            wrong.append(f"sidecar needs a method that keeps fine-tuned values; {self.method} scales them.")
        for name, least in (("chunk", 1), ("resident_mib", 0)):
            if getattr(self, name) < least:
                wrong.append(f"{name} must be >= {least}; got {getattr(self, name)}.")
        for name, pattern in (
            ("include", self.include),
            ("exclude", self.exclude),
            *((k, k) for k in self.per_tensor),
        ):
            try:
                re.compile(pattern or "")
            except re.error as error:
                wrong.append(f"{name} is no regular expression: {pattern!r} ({error}).")
        if wrong:
            raise ValueError("FAPMConfig: " + " | ".join(wrong))

    @property
    def is_global(self) -> bool:
        """Whether one threshold holds for all tensors."""
        return self.method == "ties" or (self.scope == "global" and self.method != "wise_ft")
