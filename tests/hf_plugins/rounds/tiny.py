"""A tiny federation: real tensors, a real model, everything seeded."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_plugins.rounds import InProcess, LazyClients, LocalTraining, RoundEngine, TorchClient, TrainableVector

TRUTH = torch.randn(6, 3, generator=torch.Generator().manual_seed(7))


def loss(model: Any, batch: tuple[Tensor, ...]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def records(client_id: int, count: int = 12) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(client_id))
    return x, (x @ TRUTH).argmax(1)


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def client(client_id: int, count: int = 12, **options: Any) -> TorchClient:
    training = LocalTraining(**{"learning_rate": 0.1, "batch_size": 4, **options.pop("training", {})})
    return TorchClient(client_id, records(client_id, count), loss=loss, training=training, **options)


def engine(clients: Sequence[Any] | None = None, num_clients: int = 6, **options: Any) -> RoundEngine:
    net = model()
    clients = clients if clients is not None else LazyClients(num_clients, client)
    transport = options.pop("transport", None) or InProcess(net, clients, finish=options.pop("finish", None))
    return RoundEngine(transport, TrainableVector(net).read(), progress=False, **options)
