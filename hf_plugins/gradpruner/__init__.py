"""GradPruner: drop layers that early LoRA gradients call unimportant, merge some into neighbours."""

from hf_plugins.gradpruner.callback import GradPrunerCallback
from hf_plugins.gradpruner.config import GradPrunerConfig
from hf_plugins.gradpruner.model import baseline_plan, prune_model
from hf_plugins.gradpruner.plan import PruningPlan, plan_pruning
from hf_plugins.gradpruner.storage import GradientHistory

__all__ = [
    "GradPrunerCallback",
    "GradPrunerConfig",
    "GradientHistory",
    "PruningPlan",
    "baseline_plan",
    "plan_pruning",
    "prune_model",
]
