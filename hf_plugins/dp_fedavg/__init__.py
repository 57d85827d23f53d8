"""User-level DP-FedAvg with BLUR and LUS: private federated training whose epsilon is true."""

from typing import TYPE_CHECKING, Any

from hf_plugins.dp_fedavg.clipping import clip_update
from hf_plugins.dp_fedavg.config import DPFedAvgConfig, RunConfig
from hf_plugins.dp_fedavg.hook import FinishUpdate, gradient_term
from hf_plugins.dp_fedavg.sparsification import sparsify_update
from hf_plugins.dp_fedavg.trainer import PrivateMean, private_engine

if TYPE_CHECKING:
    from hf_plugins.dp_fedavg.callback import BLURCallback
    from hf_plugins.dp_fedavg.strategy import UserLevelDP

__all__ = [
    "BLURCallback",
    "DPFedAvgConfig",
    "FinishUpdate",
    "PrivateMean",
    "RunConfig",
    "UserLevelDP",
    "clip_update",
    "gradient_term",
    "private_engine",
    "sparsify_update",
]


def __getattr__(name: str) -> Any:
    # transformers and Flower are heavy; many clients in one process need neither.
    if name == "BLURCallback":
        from hf_plugins.dp_fedavg.callback import BLURCallback

        return BLURCallback
    if name == "UserLevelDP":
        from hf_plugins.dp_fedavg.strategy import UserLevelDP

        return UserLevelDP
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
