"""DPF-CM: medical data from raw to trained model, and a vector database that guards what it memorised."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_plugins.dpf_cm.agent import Pipeline
    from hf_plugins.dpf_cm.calibration import CalibrationError
    from hf_plugins.dpf_cm.config import PPVDConfig, RecipeConfig
    from hf_plugins.dpf_cm.metric import evaluate_guard, search_memory
    from hf_plugins.dpf_cm.model import PrivacyPreservingVectorDB, Sample
    from hf_plugins.dpf_cm.server import GuardProxy

__all__ = [
    "CalibrationError",
    "GuardProxy",
    "PPVDConfig",
    "Pipeline",
    "PrivacyPreservingVectorDB",
    "RecipeConfig",
    "Sample",
    "evaluate_guard",
    "search_memory",
]
_PLACES = {
    "CalibrationError": "calibration",
    "GuardProxy": "server",
    "PPVDConfig": "config",
    "Pipeline": "agent",
    "PrivacyPreservingVectorDB": "model",
    "RecipeConfig": "config",
    "Sample": "model",
    "evaluate_guard": "metric",
    "search_memory": "metric",
}


def __getattr__(name: str) -> Any:
    # trl takes seconds to import, and a guard does not need it.
    if name not in _PLACES:
        raise AttributeError(
            f"the package hf_plugins.dpf_cm has no attribute {name!r}; it has {', '.join(__all__)}."
        )
    from importlib import import_module

    return getattr(import_module(f"hf_plugins.dpf_cm.{_PLACES[name]}"), name)
