"""What travels in a round: jobs to clients, updates back, and what a server makes of them."""

# Shapes: D trainable numbers of the model.

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from hf_plugins.rounds.vector import digest

Scalar = bool | int | float | str
"""What a config may hold: the values that Flower's ConfigRecord takes."""
Config = Mapping[str, Scalar]


class ClientFailed(RuntimeError):
    """A client raises this to say that it cannot take part; the round goes on without it."""


@dataclass(kw_only=True, frozen=True)
class Job:
    """Work for one client in one round."""

    client_id: int
    """Whose."""
    round_index: int
    """Rounds done before this one."""
    seed: int
    """Of everything random that this client does in this round."""
    config: Config = field(default_factory=dict)
    """Options of this client in this round. ``room.option`` belongs to a room and its hooks, other keys are
    options of local training; one that nobody knows is an error."""


@dataclass(kw_only=True)
class Update:
    """What one client sends back."""

    client_id: int
    """Whose."""
    round_index: int
    """Round that it answers."""
    vector_D: Tensor
    """Local minus global parameters, float32."""
    num_examples: int = 1
    """Records the client says it has trained on; not to be believed where privacy depends on it."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Anything the client reports."""
    gradient_D: Tensor | None = None
    """Gradient of the local loss, if asked for; for the client's own use, it never leaves the client."""
    base: int | None = None
    """`digest` of the model it started from, where that could be another than the one sent."""


@dataclass(kw_only=True, frozen=True)
class Dropped:
    """A client whose answer did not count."""

    client_id: int
    """Whose."""
    reason: str
    """One of: died, not finite, wrong shape, out of date, bad size, leaked gradient, no answer."""
    detail: str = ""
    """More about it."""


@dataclass(kw_only=True)
class RoundContext:
    """One round, for the functions that a method hands to the engine."""

    round_index: int
    """Rounds done before this one."""
    seed: int
    """Of the run."""
    num_clients: int
    """Clients in all, drawn or not."""
    cohort: list[int]
    """Clients drawn, sorted."""
    start_D: Tensor
    """Global model at the start."""
    dropped: list[Dropped] = field(default_factory=list)
    """Filled while updates come in."""
    updates: dict[int, dict[str, float]] = field(default_factory=dict)
    """Metrics of each client whose update counted; filled while updates come in."""

    @cached_property
    def base(self) -> int:
        """`digest` of the global model."""
        return digest(self.start_D)


@dataclass(kw_only=True)
class Aggregate:
    """What a server makes of a round's updates."""

    step_D: Tensor
    """Added to the global model."""
    metrics: dict[str, float] = field(default_factory=dict)
    """For the log, keys as ``room/name``."""


Aggregator = Callable[[Iterable[Update], RoundContext], Aggregate]
"""Updates come one at a time, in the order of their clients' ids, and need not be kept: a running sum keeps
memory flat. Called in every round, also when nobody was drawn."""
Configure = Callable[[RoundContext, int], Config]
"""Config of one client in one round."""
GradientTerm = Callable[[list[Tensor], Config, int], list[Tensor] | None]
"""Addition to the gradient of each local step: ``term(delta, config, lead)`` gets the parameters' distance
to the global model as a list of tensors with ``lead`` leading axes of clients (0 or 1), and returns
additions of the same shapes, or None for nothing."""
Finish = Callable[[Update, Job], Update]
"""The client's last touch on its update: what a method does before the update leaves the client."""


def weighted_average(updates: Iterable[Update], context: RoundContext) -> Aggregate:
    """FedAvg: mean of the updates, weighted by the records each client says it has.

    Source: McMahan et al. 2017, Algorithm 1.
    """
    total, weight = torch.zeros_like(context.start_D, dtype=torch.float64), 0
    for update in updates:
        total.add_(update.vector_D, alpha=update.num_examples)
        weight += update.num_examples
    return Aggregate(step_D=(total / max(weight, 1)).float())


def plain_mean(updates: Iterable[Update], context: RoundContext) -> Aggregate:
    """Mean of the updates, each client counting the same."""
    total, count = torch.zeros_like(context.start_D, dtype=torch.float64), 0
    for update in updates:
        total.add_(update.vector_D)
        count += 1
    return Aggregate(step_D=(total / max(count, 1)).float())
