"""A federation so small that a whole search takes a second: two kinds of clients, one linear layer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hf_plugins.hpn.config import HPNConfig
from hf_plugins.hpn.dataset import accuracy, cross_entropy, federation_of, make_encoder
from hf_plugins.hpn.server import Federation
from hf_plugins.hpn.space import Categorical, Space
from hf_plugins.rounds import LocalTraining

SPACE = Space(
    {
        "learning_rate": Categorical(choices=(0.1, 1.0)),
        "weight_decay": Categorical(choices=(0.0, 0.01)),
        "dropout": Categorical(choices=(0.0, 0.3)),
        "num_steps": Categorical(choices=(1, 3)),
    }
)


def model() -> nn.Module:
    """Dropout and one layer, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Dropout(0.1), nn.Linear(6, 3))


def parts(num_clients: int) -> list[tuple[Any, Any, Any]]:
    """Training, validation and test records of each client."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(6, 3, generator=generator)
    out = []
    for number in range(num_clients):
        x = torch.randn(60, 6, generator=generator) * (0.5 if number % 2 else 2.0)
        y = (x @ truth).argmax(dim=1)
        out.append(tuple((x[a:b], y[a:b]) for a, b in ((0, 24), (24, 42), (42, 60))))
    return out


def federation(config: HPNConfig, num_clients: int = 4, records: Sequence[Any] | None = None) -> Federation:
    """Clients in one process."""
    return federation_of(
        model(),
        list(records or parts(num_clients)),
        loss=cross_entropy,
        measure=accuracy,
        encoder=make_encoder(
            config, num_labels=3, public=torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
        ),
        config=config,
        training=LocalTraining(batch_size=8),
    )


def config(**more: Any) -> HPNConfig:
    """Four rounds, six steps."""
    return HPNConfig(**{"num_rounds": 4, "num_steps": 6, "save_every": 1, **more})
