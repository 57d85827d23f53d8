"""One resident model for all clients: what is put back, who is left out, how much memory."""

import pytest
import torch
from torch import nn

from hf_plugins.rounds import ClientFailed, InProcess, Job, LazyClients, RoundContext, TrainableVector, Update
from tests.hf_plugins.rounds import tiny


def test_clients_do_not_see_each_other() -> None:
    """Any order of clients gives each the same update; the global generator is the caller's."""
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    start = TrainableVector(net).read()
    transport = InProcess(net, LazyClients(3, tiny.client))
    torch.manual_seed(1)
    before = torch.get_rng_state()

    def updates(ids: list[int]) -> dict[int, Update]:
        context = RoundContext(round_index=0, seed=0, num_clients=3, cohort=ids, start_D=start)
        jobs = [Job(client_id=i, round_index=0, seed=i) for i in ids]
        return {u.client_id: u for u in transport.train(jobs, context)}

    one, other = updates([0, 1, 2]), updates([2, 0])
    assert torch.equal(one[2].vector_D, other[2].vector_D)
    assert torch.equal(torch.get_rng_state(), before)
    assert net[1].running_mean.abs().sum() == 0


def test_memory_is_that_of_the_client_that_trains() -> None:
    alive: list[int] = []

    class Counted(type(tiny.client(0))):
        def __del__(self) -> None:
            alive.remove(self.client_id)

    def make(client_id: int) -> Counted:
        alive.append(client_id)
        return Counted(client_id, tiny.records(client_id), loss=tiny.loss)

    most = []

    def finish(update: Update, job: Job) -> Update:
        most.append(len(alive))
        return update

    tiny.engine(LazyClients(1000, make), finish=finish).step(
        TrainableVector(tiny.model()).read(), 0, cohort=range(0, 1000, 100)
    )
    assert max(most) <= 1
    assert alive == []


def test_who_fails_is_left_out() -> None:
    class Ill(type(tiny.client(0))):
        def train(self, weights: TrainableVector, job: Job) -> Update:
            raise ClientFailed("battery empty")

    ill = Ill(1, tiny.records(1), loss=tiny.loss)
    outcome = tiny.engine([tiny.client(0), ill]).step(TrainableVector(tiny.model()).read(), 0)
    assert [(d.client_id, d.reason, d.detail) for d in outcome.context.dropped] == [
        (1, "died", "battery empty")
    ]
    assert list(outcome.context.updates) == [0]


def test_lazy_clients_know_their_number() -> None:
    clients = LazyClients(2, tiny.client)
    assert len(clients) == 2
    with pytest.raises(IndexError, match="there is no client .*; they are 0 to "):
        clients[2]
