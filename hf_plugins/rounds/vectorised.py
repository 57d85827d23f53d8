"""Many small clients trained side by side: one batched computation instead of one after the other."""

# Shapes: G clients of a group, D trainable numbers, B records of a step, S steps.

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from hf_plugins.rounds.training import Client, LocalTraining, TorchClient, batches
from hf_plugins.rounds.transport import InProcess, finished
from hf_plugins.rounds.update import Dropped, Finish, GradientTerm, Job, RoundContext, Update


class GroupedInProcess(InProcess):
    """`InProcess` that trains groups of clients at once, for `TorchClient` with plain SGD.

    The same steps on the same batches; results agree with one after the other up to rounding. The model must
    be one that ``torch.func.vmap`` can run (no recurrent cells, no dropout). Memory grows with the group.

    Args:
        model: The resident model.
        clients: Clients, all `TorchClient`.
        group_size: Clients side by side, >= 1.
        finish: As in `InProcess`.
    """

    def __init__(
        self, model: nn.Module, clients: Sequence[Client], *, group_size: int, finish: Finish | None = None
    ) -> None:
        if group_size < 1:
            raise ValueError(f"group_size must be >= 1; got {group_size}.")
        super().__init__(model, clients, finish=finish)
        self.group_size = group_size

    def train(self, jobs: Sequence[Job], context: RoundContext) -> Iterator[Update | Dropped]:
        """One group after the other."""
        for start in range(0, len(jobs), self.group_size):
            group = list(jobs[start : start + self.group_size])
            clients = [_plain(self.clients[job.client_id]) for job in group]
            with self.resident(context.start_D, group[0]):
                updates = train_group(self.weights.model, self.weights, clients, group, context.start_D)
            for update, job in zip(updates, group, strict=True):
                yield finished(update, job, self.finish)


def _plain(client: Client) -> TorchClient:
    if not isinstance(client, TorchClient) or client.prepare is not None:
        raise ValueError(
            f"client {client.client_id} cannot be trained in a group: only TorchClient without prepare can. "
            "Use InProcess."
        )
    return client


def _options(clients: Sequence[TorchClient], jobs: Sequence[Job]) -> list[LocalTraining]:
    options = [c.training.with_config(job.config) for c, job in zip(clients, jobs, strict=True)]
    if any(o.optimizer != "sgd" or o.max_grad_norm or o.keep_gradient == "full" for o in options):
        raise ValueError(
            "training in groups knows optimizer='sgd' without max_grad_norm and keep_gradient 'none' or "
            "'last'; use InProcess for the rest."
        )
    shared = [{k: v for k, v in job.config.items() if "." in k} for job in jobs]
    if any(config != shared[0] for config in shared):
        raise ValueError("clients of a group need one config for a method's hooks; use InProcess.")
    return options


def train_group(
    model: nn.Module, layout: Any, clients: Sequence[TorchClient], jobs: Sequence[Job], start_D: Tensor
) -> list[Update]:
    """Train a group of clients from one model.

    Args:
        model: The resident model; only called, never changed.
        layout: Its `TrainableVector`.
        clients: The group; they share the first one's loss and terms.
        jobs: A job for each.
        start_D: Global model.

    Returns:
        Updates in the order of the jobs.
    """
    options = _options(clients, jobs)
    sizes = [len(client.records[0]) for client in clients]
    plans = [batches(n, o, job.seed) for n, o, job in zip(sizes, options, jobs, strict=True)]
    index_GSB, weight_GSB, length_G = _padded(plans, sizes)
    records = [torch.cat(parts) for parts in zip(*(c.records for c in clients), strict=True)]
    rate_G1 = torch.tensor(
        [o.learning_rate * o.learning_rate_decay**j.round_index for o, j in zip(options, jobs, strict=True)],
    )[:, None]
    momentum_G1 = torch.tensor([o.momentum for o in options])[:, None]
    decay_G1 = torch.tensor([o.weight_decay for o in options])[:, None]
    model.train()
    slope = vmap(grad_and_value(_loss_of(model, layout, clients[0].loss)), randomness="error")
    w_GD = start_D.expand(len(jobs), -1).clone()
    velocity_GD, last_GD = torch.zeros_like(w_GD), torch.zeros_like(w_GD)
    loss_G = torch.zeros(len(jobs))
    for s in range(index_GSB.shape[1]):
        active_G1 = torch.gt(length_G, s)[:, None]
        batch = tuple(tensor[index_GSB[:, s]] for tensor in records)
        g_GD, value_G = slope(w_GD, batch, weight_GSB[:, s])
        loss_G += torch.where(active_G1[:, 0], value_G, 0.0)
        last_GD = torch.where(torch.eq(length_G, s + 1)[:, None], g_GD, last_GD)
        g_GD = _with_terms(g_GD, w_GD - start_D, clients[0].terms, jobs[0]) + decay_G1 * w_GD
        velocity_GD = torch.where(active_G1, momentum_G1 * velocity_GD + g_GD, velocity_GD)
        w_GD = torch.where(active_G1, w_GD - rate_G1 * velocity_GD, w_GD)
    return [
        Update(
            client_id=job.client_id,
            round_index=job.round_index,
            vector_D=w_GD[g] - start_D,
            num_examples=len(clients[g].records[0]),
            metrics={"loss": float(loss_G[g] / length_G[g])} if length_G[g] else {},
            gradient_D=last_GD[g] if options[g].keep_gradient == "last" and length_G[g] else None,
        )
        for g, job in enumerate(jobs)
    ]


def _padded(plans: list[list[Tensor]], sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the joined records for each client and step, their weights (0 for padding), steps of each."""
    steps = max((len(plan) for plan in plans), default=0)
    width = max((len(rows) for plan in plans for rows in plan), default=1)
    index = torch.zeros(len(plans), steps, width, dtype=torch.long)
    weight = torch.zeros(len(plans), steps, width)
    offset = 0
    for g, plan in enumerate(plans):
        for s, rows in enumerate(plan):
            index[g, s, : len(rows)] = rows + offset
            weight[g, s, : len(rows)] = 1
        offset += sizes[g]
    return index, weight, torch.tensor([len(plan) for plan in plans])


def _loss_of(model: nn.Module, layout: Any, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def mean_loss(w_D: Tensor, batch: tuple[Tensor, ...], weight_B: Tensor) -> Tensor:
        named = layout.named(w_D)
        losses = loss(lambda *inputs: functional_call(model, named, inputs), batch)
        # Where a client has no step left all weights are 0 and the gradient is not used.
        return (losses * weight_B).sum() / weight_B.sum().clamp(min=1)

    return mean_loss


def _with_terms(g_GD: Tensor, delta_GD: Tensor, terms: Sequence[GradientTerm], job: Job) -> Tensor:
    for term in terms:
        additions = term([delta_GD], job.config, 1)
        if additions is not None:
            g_GD = g_GD + additions[0]
    return g_GD
