"""How jobs reach clients. In process: one resident model that every client trains in turn."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from hf_plugins.rounds.seeds import seed_for
from hf_plugins.rounds.training import Client
from hf_plugins.rounds.update import ClientFailed, Dropped, Finish, Job, RoundContext, Update
from hf_plugins.rounds.vector import TrainableVector


class Transport(Protocol):
    """What the engine needs: whom there is, and a way to give them work."""

    def client_ids(self) -> Sequence[int]:
        """All clients, drawn or not."""
        ...

    def train(self, jobs: Sequence[Job], context: RoundContext) -> Iterator[Update | Dropped]:
        """Give out the jobs, from ``context.start_D``; answers in the order of the jobs."""
        ...

    def evaluate(self, jobs: Sequence[Job], vector_D: Tensor) -> Iterator[tuple[int, dict[str, float]]]:
        """Figures of a model from each client that can give them."""
        ...


class InProcess:
    """Many clients on one machine: each trains the one resident model, which is then put back.

    Memory does not grow with the number of clients that are not training, provided ``clients`` makes them
    when they are asked for: any object with ``__len__`` and ``__getitem__`` does, such as `LazyClients`.

    Args:
        model: The resident model, in place on its device.
        clients: Clients; the position is the client's id.
        finish: The client's last touch on its update, or None; see `Finish`.
    """

    def __init__(self, model: nn.Module, clients: Sequence[Client], *, finish: Finish | None = None) -> None:
        self.weights = TrainableVector(model)
        self.clients = clients
        self.finish = finish
        self._buffers = self.weights.buffers()

    def client_ids(self) -> Sequence[int]:
        """Positions in ``clients``."""
        return range(len(self.clients))

    def train(self, jobs: Sequence[Job], context: RoundContext) -> Iterator[Update | Dropped]:
        """One client after the other."""
        for job in jobs:
            with self.resident(context.start_D, job):
                try:
                    update = self.clients[job.client_id].train(self.weights, job)
                except ClientFailed as error:
                    yield Dropped(client_id=job.client_id, reason="died", detail=str(error))
                    continue
            yield finished(update, job, self.finish)

    def evaluate(self, jobs: Sequence[Job], vector_D: Tensor) -> Iterator[tuple[int, dict[str, float]]]:
        """One client after the other; those that raise `ClientFailed` are left out."""
        for job in jobs:
            with self.resident(vector_D, job):
                try:
                    found = self.clients[job.client_id].evaluate(self.weights, job)
                except ClientFailed:
                    continue
            yield job.client_id, found

    @contextlib.contextmanager
    def resident(self, vector_D: Tensor, job: Job) -> Iterator[None]:
        """The model with these parameters and PyTorch's global generator seeded for the job.

        Afterwards generator and buffers are as before; parameters are not, they are set for each job.
        """
        self.weights.write_(vector_D)
        state = torch.get_rng_state()
        torch.manual_seed(seed_for(job.seed, "global"))
        try:
            yield
        finally:
            torch.set_rng_state(state)
            self.weights.restore_buffers_(self._buffers)


def finished(update: Update, job: Job, finish: Finish | None) -> Update:
    """The update as it leaves the client: last touch done, the gradient left behind."""
    if finish is not None:
        update = finish(update, job)
    update.gradient_D = None
    return update


class LazyClients(Sequence[Client]):
    """Clients that are made when they are asked for and forgotten afterwards.

    Args:
        num_clients: How many there are.
        make: ``make(client_id)`` builds one.
    """

    def __init__(self, num_clients: int, make: "MakeClient") -> None:
        self._num_clients = num_clients
        self._make = make

    def __len__(self) -> int:
        return self._num_clients

    def __getitem__(self, index: int) -> Client:  # type: ignore[override]
        if not 0 <= index < self._num_clients:
            raise IndexError(f"there is no client {index}; they are 0 to {self._num_clients - 1}.")
        return self._make(index)


class MakeClient(Protocol):
    """Builds one client."""

    def __call__(self, client_id: int, /) -> Client:
        """The client with this id."""
        ...
