"""The mod around a train function: what leaves a node, for our own replies and for Flower's common form."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")
from flwr.app import ArrayRecord, Error, Message, MetricRecord, RecordDict  # noqa: E402

from hf_plugins.dp_fedavg.client import recipe_population, user_level_mod  # noqa: E402
from hf_plugins.dp_fedavg.hook import client_options  # noqa: E402
from hf_plugins.rounds import Job, TrainableVector, Update  # noqa: E402
from hf_plugins.rounds.flower import job_record, read_update, reply_with, to_arrays  # noqa: E402
from hf_plugins.rounds.vector import digest  # noqa: E402
from tests.hf_plugins.dp_fedavg.tiny import DATA, config  # noqa: E402
from tests.hf_plugins.rounds import tiny  # noqa: E402
from tests.hf_plugins.rounds.test_flower import as_task  # noqa: E402

pytestmark = pytest.mark.host
WEIGHTS = TrainableVector(tiny.model())
START = WEIGHTS.read()
DELTA = torch.linspace(-1, 1, len(WEIGHTS))


def message(**options: Any) -> tuple[Message, Job]:
    as_task()
    given = client_options(config(**options), clipping_norm=0.5, noise_multiplier=1.0, num_clients=10)
    job = Job(client_id=2, round_index=4, seed=1, config=given)
    content = RecordDict({"arrays": to_arrays(WEIGHTS, START), "config": job_record(job, digest(START))})
    sent = Message(content, dst_node_id=1, message_type="train")
    sent.metadata.__dict__["_message_id"] = "1"
    return sent, job


def through_mod(train: Any, **options: Any) -> Update:
    sent, job = message(**options)
    reply = user_level_mod(sent, SimpleNamespace(), lambda m, c: train(m))
    assert set(reply.content) == {"update", "metrics", "rounds"}, "no gradient, no weights"
    return read_update(reply.content, WEIGHTS, job)


def own(message: Message) -> Message:
    update = Update(
        client_id=2,
        round_index=4,
        vector_D=DELTA,
        num_examples=99,
        gradient_D=torch.ones(53),
        base=digest(START),
    )
    return reply_with(update, WEIGHTS, message)


def common(message: Message) -> Message:
    arrays = dict(to_arrays(WEIGHTS, START + DELTA))
    arrays["running_mean"] = to_arrays(WEIGHTS, START)["0.bias"]
    return Message(
        RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 99})}),
        reply_to=message,
    )


def test_clipped_and_without_its_size() -> None:
    for train in (own, common):
        update = through_mod(train)
        assert float(update.vector_D.norm()) == pytest.approx(0.5, rel=1e-5)
        assert update.num_examples == 1
        assert update.base == digest(START)
        torch.testing.assert_close(
            update.vector_D / update.vector_D.norm(), DELTA / DELTA.norm(), atol=1e-5, rtol=0
        )


def test_sparsified_by_the_gradient() -> None:
    update = through_mod(own, keep_ratio=0.25)
    assert 0.2 < float((update.vector_D != 0).float().mean()) < 0.35
    by_size = through_mod(common, keep_ratio=0.25, lus_score="magnitude")
    assert 0.2 < float((by_size.vector_D != 0).float().mean()) < 0.35


def test_error_of_the_train_function_passes() -> None:
    sent, _ = message()
    error = Message(Error(code=1, reason="x"), reply_to=sent)
    assert user_level_mod(sent, SimpleNamespace(), lambda m, c: error) is error


def test_refusals() -> None:
    sent, _ = message()
    with pytest.raises(ValueError, match="must reply with 'update' or with all its new weights"):
        user_level_mod(sent, SimpleNamespace(), lambda m, c: Message(RecordDict(), reply_to=m))

    def other(m: Message) -> Message:
        return Message(RecordDict({"update": ArrayRecord({})}), reply_to=m)

    with pytest.raises(ValueError, match="update does not fit the model"):
        user_level_mod(sent, SimpleNamespace(), lambda m, c: other(m))


@pytest.mark.real
def test_node_of_a_recipe_holds_its_share() -> None:
    run_config = {
        "task": "images",
        "data": "elsewhere",
        "output-dir": "x",
        "num-rounds": 1,
        "num-clients": 5,
        "model": "mlp",
        "dp.noise-multiplier": 1.0,
    }
    node = {"partition-id": 1, "num-partitions": 2, "data": str(DATA)}
    found = recipe_population(SimpleNamespace(run_config=run_config, node_config=node))
    assert list(found.hosted) == [1, 3]
    assert len(found.transport.clients) == 5
