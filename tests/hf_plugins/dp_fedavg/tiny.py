"""A tiny private federation, and a recipe on the real images of the repository."""

from pathlib import Path
from typing import Any

from torch import nn

from hf_plugins.dp_fedavg import DPFedAvgConfig, gradient_term, private_engine
from hf_plugins.rounds import LazyClients, RoundEngine
from tests.hf_plugins.rounds import tiny

ROOT = Path(__file__).resolve().parents[3]
RECIPE = ROOT / "configs" / "dp_fedavg" / "fashion_mnist_tiny.yaml"
DATA = ROOT / "tests" / "data" / "fashion_mnist_tiny"


def config(**options: Any) -> DPFedAvgConfig:
    """Without the method's parts unless asked for: plain DP-FedAvg."""
    base = {
        "noise_multiplier": 4.0,
        "clipping_norm": 0.05,
        "sample_rate": 0.5,
        "blur": 0.0,
        "keep_ratio": 1.0,
    }
    return DPFedAvgConfig(**{**base, "seed": 0, "log_private_statistics": True, **options})


def engine(
    dp: DPFedAvgConfig | None = None,
    *,
    clients: Any = None,
    num_clients: int = 8,
    num_rounds: int = 4,
    model: nn.Module | None = None,
    **options: Any,
) -> RoundEngine:
    def make(client_id: int) -> Any:
        return tiny.client(client_id, terms=[gradient_term])

    return private_engine(
        model or tiny.model(),
        clients if clients is not None else LazyClients(num_clients, make),
        dp or config(),
        num_rounds=num_rounds,
        progress=False,
        **{"evaluate_every": 100, **options},
    )
