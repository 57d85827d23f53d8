"""LLM-AutoDP: agents that search the data-processing strategy of a fine-tuning set without seeing the
data.
"""

from typing import TYPE_CHECKING, Any

from hf_plugins.autodp.config import AutoDPConfig
from hf_plugins.autodp.privacy import PrivacyError, PrivacyGuard
from hf_plugins.autodp.sampling import sample_rows
from hf_plugins.autodp.strategies import Space, StepSpec

if TYPE_CHECKING:
    from hf_plugins.autodp.callback import AutoDPReportCallback
    from hf_plugins.autodp.strategy import AutoDP

__all__ = [
    "AutoDP",
    "AutoDPConfig",
    "AutoDPReportCallback",
    "PrivacyError",
    "PrivacyGuard",
    "Space",
    "StepSpec",
    "sample_rows",
]

_LAZY = {"AutoDP": "strategy", "AutoDPReportCallback": "callback"}


def __getattr__(name: str) -> Any:
    # transformers, trl and datasets cost seconds, which options and cores can do without.
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"hf_plugins.autodp.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
