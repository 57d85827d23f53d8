"""Rounds: FedAvg identities, faults, resume, a killed process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_plugins.rounds import (
    Aggregate,
    ClientFailed,
    Dropped,
    Job,
    RoundContext,
    Sampling,
    TrainableVector,
    Update,
    plain_mean,
)
from tests.hf_plugins.rounds import tiny

ROOT = Path(__file__).resolve().parents[3]


def test_one_full_batch_of_equal_clients_is_one_central_step() -> None:
    """Q = 1, full batches, equal sizes: FedAvg is SGD on all records."""
    engine = tiny.engine([tiny.client(i, training={"batch_size": 12}) for i in range(4)])
    start = engine.vector_D.clone()
    engine.run(1)
    net = tiny.model()
    weights = TrainableVector(net)
    weights.write_(start)
    x, y = (torch.cat(parts) for parts in zip(*(tiny.records(i) for i in range(4)), strict=True))
    tiny.loss(net, (x, y)).mean().backward()
    torch.testing.assert_close(engine.vector_D, start - 0.1 * weights.read_gradient(), atol=1e-6, rtol=0)


def test_weighted_and_plain_mean() -> None:
    context = RoundContext(round_index=0, seed=0, num_clients=2, cohort=[0, 1], start_D=torch.zeros(1))
    updates = [
        Update(client_id=0, round_index=0, vector_D=torch.tensor([1.0]), num_examples=3),
        Update(client_id=1, round_index=0, vector_D=torch.tensor([5.0]), num_examples=1),
    ]
    from hf_plugins.rounds import weighted_average

    assert weighted_average(iter(updates), context).step_D.tolist() == [2.0]
    assert plain_mean(iter(updates), context).step_D.tolist() == [3.0]
    assert weighted_average(iter([]), context).step_D.tolist() == [0.0]
    assert plain_mean(iter([]), context).step_D.tolist() == [0.0]


class Faulty(type(tiny.client(0))):
    """A client whose answer is changed before it is sent."""

    change = staticmethod(lambda update: update)

    def train(self, weights: TrainableVector, job: Job) -> Update:
        return type(self).change(super().train(weights, job))


def faulty(change: object) -> Faulty:
    kind = type("Changed", (Faulty,), {"change": staticmethod(change)})
    return kind(1, tiny.records(1), loss=tiny.loss)


def _set(**values: object) -> object:
    def change(update: Update) -> Update:
        for name, value in values.items():
            setattr(update, name, value)
        return update

    return change


def _raise(update: Update) -> Update:
    raise ClientFailed("out of memory")


FAULTS = {
    "not finite": _set(vector_D=torch.full((53,), float("nan"))),
    "wrong shape": _set(vector_D=torch.zeros(7)),
    "out of date": _set(round_index=-1),
    "bad size": _set(num_examples=-5),
    "died": _raise,
}


@pytest.mark.parametrize("reason", FAULTS)
def test_round_completes_without_a_faulty_client(reason: str) -> None:
    good = tiny.client(0)
    outcome = tiny.engine([good, faulty(FAULTS[reason])]).step(TrainableVector(tiny.model()).read(), 0)
    alone = tiny.engine([good]).step(TrainableVector(tiny.model()).read(), 0)
    assert [(d.client_id, d.reason) for d in outcome.context.dropped] == [(1, reason)]
    assert torch.equal(outcome.vector_D, alone.vector_D)


def test_update_from_another_model_is_out_of_date() -> None:
    engine = tiny.engine([faulty(_set(base=12345))])
    outcome = engine.step(engine.vector_D, 0)
    assert outcome.context.dropped[0].reason == "out of date"
    right = tiny.engine([faulty(_set(base=outcome.context.base))])
    assert right.step(engine.vector_D, 0).context.dropped == []


def test_gradient_never_leaves_the_client() -> None:
    engine = tiny.engine([tiny.client(0, training={"keep_gradient": "last"})])
    outcome = engine.step(engine.vector_D, 0)
    assert outcome.context.dropped == []
    context = RoundContext(round_index=0, seed=0, num_clients=1, cohort=[0], start_D=torch.zeros(2))
    leak = Update(client_id=0, round_index=0, vector_D=torch.zeros(2), gradient_D=torch.zeros(2))
    engine.complete(context, [leak])
    assert context.dropped[0].reason == "leaked gradient"


def test_zero_update_and_empty_cohort_are_rounds() -> None:
    engine = tiny.engine([faulty(_set(vector_D=torch.zeros(53)))])
    assert engine.step(engine.vector_D, 0).context.dropped == []
    outcome = engine.step(engine.vector_D, 0, cohort=[])
    assert torch.equal(outcome.vector_D, engine.vector_D)
    assert outcome.metrics["rounds/cohort"] == 0


def test_not_finite_model_stops_the_run() -> None:
    def explode(updates: object, context: RoundContext) -> Aggregate:
        list(updates)
        return Aggregate(step_D=torch.full_like(context.start_D, float("inf")))

    engine = tiny.engine(aggregate=explode)
    with pytest.raises(RuntimeError, match="the new model is not finite, so the run stops"):
        engine.run(1)
    assert engine.round_index == 0


def test_programming_errors_are_not_taken_for_dead_clients() -> None:
    def change(update: Update) -> Update:
        raise KeyError("a bug")

    engine = tiny.engine([faulty(change)])
    with pytest.raises(KeyError, match="a bug"):
        engine.step(engine.vector_D, 0)


def test_step_is_a_function_of_its_arguments() -> None:
    engine = tiny.engine(sampling=Sampling(mode="poisson", rate=0.5), seed=4)
    one, two = (engine.step(engine.vector_D, 3) for _ in range(2))
    assert torch.equal(one.vector_D, two.vector_D)
    assert one.context.cohort == two.context.cohort
    assert engine.round_index == 0
    slow = engine.step(engine.vector_D, 3, configure=lambda context, i: {"learning_rate": 1e-9})
    assert float((slow.vector_D - engine.vector_D).abs().max()) < 1e-6


def test_each_client_has_its_own_config() -> None:
    seen = {}

    class Noting(type(tiny.client(0))):
        def train(self, weights: TrainableVector, job: Job) -> Update:
            seen[job.client_id] = dict(job.config)
            return super().train(weights, job)

    clients = [Noting(i, tiny.records(i), loss=tiny.loss) for i in range(2)]
    tiny.engine(clients, configure=lambda c, i: {"learning_rate": 0.1 * (i + 1)}).run(1)
    assert seen == {0: {"learning_rate": 0.1}, 1: {"learning_rate": 0.2}}


class Counter:
    def __init__(self) -> None:
        self.value = 0

    def __call__(self, updates: object, context: RoundContext) -> Aggregate:
        self.value += 1
        return plain_mean(updates, context)

    def state_dict(self) -> dict:
        return {"value": self.value}

    def load_state_dict(self, state: dict) -> None:
        self.value = state["value"]


def counted(folder: Path | None, **options: object) -> tuple:
    counter = Counter()
    return counter, tiny.engine(
        aggregate=counter,
        stateful={"counter": counter},
        sampling=Sampling(mode="poisson", rate=0.5),
        folder=folder,
        evaluate=lambda vector: {"test/norm": float(vector.norm())},
        **options,
    )


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    _, whole = counted(None)
    whole.run(6)
    _, first = counted(tmp_path)
    first.run(2)
    counter, second = counted(tmp_path)
    history = second.run(6)
    assert torch.equal(second.vector_D, whole.vector_D)
    assert counter.value == 6
    plain = [{k: v for k, v in row.items() if k != "rounds/seconds"} for row in history]
    assert plain == [{k: v for k, v in row.items() if k != "rounds/seconds"} for row in whole.history]
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == history
    assert second.run(6) == history, "nothing is left to do"


def test_evaluation_every_so_often_and_hidden_metrics() -> None:
    engine = tiny.engine(evaluate=lambda v: {"test/x": 1.0}, evaluate_every=2, hidden=("clients/", "rounds/"))
    rows = engine.run(3)
    assert ["test/x" in row for row in rows] == [False, True, True]
    assert not any(name.startswith(("clients/", "rounds/")) for row in rows for name in row)
    called = []
    tiny.engine(on_round=[called.append]).run(2)
    assert [row["round"] for row in called] == [1, 2]


def test_refusals(tmp_path: Path) -> None:
    counted(tmp_path)[1].run(1)
    with pytest.raises(ValueError, match="holds a run with other settings .*seed: 0 then, 1 now"):
        counted(tmp_path, seed=1)[1].run(2)
    other = tiny.engine(folder=tmp_path)
    with pytest.raises(ValueError, match="carries the state of"):
        other.run(2)
    engine = counted(tmp_path)[1]
    engine.vector_D = torch.zeros(3)
    with pytest.raises(ValueError, match="build the model as the run did"):
        engine.resume()
    with pytest.raises(ValueError, match="count rounds and must be >= 1"):
        tiny.engine(save_every=0)


def test_clients_are_evaluated_on_their_own_records() -> None:
    clients = [tiny.client(0, validation=tiny.records(5)), tiny.client(1)]
    engine = tiny.engine(clients)
    found = engine.evaluate_clients(engine.vector_D)
    assert list(found) == [0]
    expected = float(tiny.loss(tiny.model(), tiny.records(5)).mean().detach())
    assert found[0]["loss"] == pytest.approx(expected, rel=1e-5)


KILLED = """
import sys, time
from pathlib import Path
from tests.hf_plugins.rounds.test_engine import counted
counter, engine = counted(Path(sys.argv[1]))
engine.on_round.append(lambda row: (print(row["round"], flush=True), time.sleep(0.05)))
engine.run(int(sys.argv[2]))
"""


@pytest.mark.host
def test_killed_process_loses_nothing(tmp_path: Path) -> None:
    """SIGKILL at any moment: weights and state of the restart equal an uninterrupted run."""
    words = [sys.executable, "-c", KILLED, str(tmp_path), "12"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env)
    assert process.stdout is not None
    while process.stdout.readline().strip() != "4":
        assert process.poll() is None
    time.sleep(0.03)
    process.send_signal(signal.SIGKILL)
    process.wait()
    counter, resumed = counted(tmp_path)
    resumed.run(12)
    _, whole = counted(None)
    whole.run(12)
    assert torch.equal(resumed.vector_D, whole.vector_D)
    assert counter.value == 12


def test_dropped_answers_of_a_transport_are_counted() -> None:
    class Silent:
        def client_ids(self) -> range:
            return range(3)

        def train(self, jobs: list[Job], context: RoundContext) -> list:
            return [Dropped(client_id=j.client_id, reason="no answer") for j in jobs]

        def evaluate(self, jobs: list[Job], vector_D: Tensor) -> list:
            return []

    row = tiny.engine(transport=Silent()).run(1)[0]
    assert row["rounds/dropped"] == row["rounds/dropped/no answer"] == 3
