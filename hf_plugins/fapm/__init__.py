"""FAPM: a fine-tuned model that forgets less, by pruning its task vector; streaming over safetensors."""

from typing import TYPE_CHECKING, Any

from hf_plugins.fapm.config import FAPMConfig
from hf_plugins.fapm.keep_curve import keep_curve
from hf_plugins.fapm.model import apply_sidecar, fapm_prune_checkpoint
from hf_plugins.fapm.task_vector import PruneStats, fapm_prune_tensor

if TYPE_CHECKING:
    from hf_plugins.fapm.callback import FAPMCallback

__all__ = [
    "FAPMCallback",
    "FAPMConfig",
    "PruneStats",
    "apply_sidecar",
    "fapm_prune_checkpoint",
    "fapm_prune_tensor",
    "keep_curve",
]


def __getattr__(name: str) -> Any:
    # transformers costs 160 MB and two seconds, which a run over checkpoints on disk can do without.
    if name == "FAPMCallback":
        from hf_plugins.fapm.callback import FAPMCallback

        return FAPMCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
