"""Messages of Flower: nothing is lost on the way, nothing wrong gets through. No network here."""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

from hf_plugins.rounds import InProcess, Job, RoundContext, TrainableVector, Update  # noqa: E402
from hf_plugins.rounds.flower import (  # noqa: E402
    FlowerTransport,
    Population,
    from_arrays,
    hosted_share,
    job_record,
    layout_of,
    read_job,
    read_update,
    round_client_app,
    to_arrays,
)
from tests.hf_plugins.rounds import tiny  # noqa: E402


def test_vectors_and_jobs_round_trip() -> None:
    weights = TrainableVector(tiny.model())
    vector = torch.randn(len(weights), generator=torch.Generator().manual_seed(0))
    record = to_arrays(weights, vector)
    assert list(record) == weights.names
    assert torch.equal(from_arrays(weights, record), vector)
    assert layout_of(record).sizes == weights.sizes
    job = Job(client_id=7, round_index=3, seed=2**63 - 1, config={"learning_rate": 0.1, "room.name": "x"})
    assert read_job(job_record(job, base=9)) == job


def as_task() -> None:
    """Messages name the run and the task that make them; a ServerApp's process is told which it is."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1


class Node:
    """A grid with nodes that answer in process, as SuperNodes would."""

    def __init__(self, apps: dict[int, Any], change: Any = None) -> None:
        as_task()
        self.apps, self.change, self.queries = apps, change, 0

    def get_node_ids(self) -> list[int]:
        return list(self.apps)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float) -> list[Message]:
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            self.queries += message.metadata.message_type == "query.hosted"
            message.metadata.__dict__["_message_id"] = "1"
            context = SimpleNamespace(run_id=1, node_id=node, node_config={}, run_config={})
            reply = self.apps[node](message, context)
            reply.metadata.__dict__["_src_node_id"] = node
            reply = self.change(reply) if self.change and message.metadata.message_type == "train" else reply
            if reply is not None:
                replies.append(reply)
        # Answers come in any order.
        return replies[::-1]


def app(hosted: list[int], num_clients: int = 4) -> Any:
    clients = [tiny.client(i, validation=tiny.records(i + 10)) for i in range(num_clients)]
    return round_client_app(
        lambda context: Population(transport=InProcess(tiny.model(), clients), hosted=hosted),
        finish_needed=False,
    )


def transport(grid: Any, **options: Any) -> FlowerTransport:
    return FlowerTransport(grid, TrainableVector(tiny.model()), num_clients=4, **options)


def test_rounds_over_messages_equal_rounds_in_process() -> None:
    grid = Node({11: app([0, 2]), 22: app([1, 3])})
    over = tiny.engine(transport=transport(grid))
    here = tiny.engine([tiny.client(i, validation=tiny.records(i + 10)) for i in range(4)])
    over.run(2), here.run(2)
    assert torch.equal(over.vector_D, here.vector_D)
    assert grid.queries == 2, "a node is asked once whom it holds"
    assert over.evaluate_clients(over.vector_D) == here.evaluate_clients(here.vector_D)


def test_user_without_a_node_counts_as_not_answering() -> None:
    engine = tiny.engine(transport=transport(Node({11: app([0, 2])})))
    outcome = engine.step(engine.vector_D, 0)
    assert {d.client_id: d.reason for d in outcome.context.dropped} == {1: "no answer", 3: "no answer"}


def broken(kind: str) -> Any:
    def change(reply: Message) -> Message | None:
        if kind == "no answer":
            return None
        if kind == "died":
            error = Message(Error(code=0, reason="killed"), reply_to=reply)
            error.metadata.__dict__["_src_node_id"] = reply.metadata.src_node_id
            return error
        update = dict(reply.content["update"])
        if kind == "wrong shape":
            del update["0.weight"]
        if kind == "not finite":
            update["0.bias"] = to_arrays(TrainableVector(tiny.model()), torch.full((53,), float("nan")))[
                "0.bias"
            ]
        reply.content["update"] = ArrayRecord(update)
        if kind == "out of date":
            reply.content["rounds"]["rounds.base"] = 1
        if kind == "bad size":
            reply.content["metrics"]["num-examples"] = -3
        return reply

    return change


@pytest.mark.parametrize(
    "kind", ["no answer", "died", "wrong shape", "not finite", "out of date", "bad size"]
)
def test_faulty_answers_are_named(kind: str) -> None:
    engine = tiny.engine(transport=transport(Node({11: app([0, 1, 2, 3])}, broken(kind))))
    outcome = engine.step(engine.vector_D, 0)
    assert {d.reason for d in outcome.context.dropped} == {kind}
    assert len(outcome.context.dropped) == 4
    assert torch.equal(outcome.vector_D, engine.vector_D)


def test_node_cannot_speak_for_another_nodes_user() -> None:
    def steal(reply: Message) -> Message:
        reply.content["rounds"]["rounds.client"] = 3
        return reply

    grid = Node({11: app([0]), 22: app([3])}, steal)
    engine = tiny.engine(transport=transport(grid))
    outcome = engine.step(engine.vector_D, 0, cohort=[0, 3])
    assert list(outcome.context.updates) == [3]


def test_reply_without_update_or_echo() -> None:
    weights, job = TrainableVector(tiny.model()), Job(client_id=0, round_index=0, seed=0)
    assert read_update(RecordDict(), weights, job).reason == "wrong shape"
    bare = RecordDict({"update": to_arrays(weights, torch.zeros(53))})
    found = read_update(bare, weights, job)
    assert isinstance(found, Update)
    assert found.round_index == -1, "who does not say which round it answers is out of date"
    odd = RecordDict(
        {
            "update": to_arrays(weights, torch.zeros(53)),
            "metrics": MetricRecord({"num-examples": float("nan"), "x": [1.0]}),
            "rounds": ConfigRecord({"rounds.round": 0}),
        }
    )
    read = read_update(odd, weights, job)
    assert (read.num_examples, read.metrics) == (-1, {})


def test_late_nodes_are_waited_for_and_absent_ones_named() -> None:
    grid = Node({11: app([0, 1, 2, 3])})
    with pytest.raises(RuntimeError, match="; start the missing SuperNodes, or lower num_nodes"):
        transport(grid, num_nodes=2, timeout=0.0, poll=0.01).hosts()
    empty = RoundContext(round_index=0, seed=0, num_clients=4, cohort=[], start_D=torch.zeros(53))
    assert list(transport(grid).train([], empty)) == []


def test_share_of_a_node() -> None:
    context = SimpleNamespace(node_config={"partition-id": 1, "num-partitions": 3})
    assert hosted_share(context, 8) == [1, 4, 7]
    with pytest.raises(ValueError, match="the node must know its part of the users"):
        hosted_share(SimpleNamespace(node_config={}), 8)
