"""Clients side by side: the same updates as one after the other."""

import pytest
import torch
from torch import Tensor

from hf_plugins.rounds import GroupedInProcess, InProcess, Sampling
from tests.hf_plugins.rounds import tiny


def pull(delta: list[Tensor], config: dict, lead: int) -> list[Tensor]:
    """A term whose strength is each client's own norm, so that mixing clients up would show."""
    squares = sum(d.square().flatten(lead).sum(-1) for d in delta)
    norm = squares.sqrt()
    return [d * norm.reshape(norm.shape + (1,) * (d.dim() - lead)) for d in delta]


@pytest.mark.parametrize("training", [{}, {"momentum": 0.5, "weight_decay": 0.01}, {"num_steps": 2}])
@pytest.mark.parametrize("group_size", [1, 3, 10])
def test_equal_to_one_after_the_other(training: dict, group_size: int) -> None:
    """Sizes 3 to 10, so steps and batches differ; the last group is smaller; float32 rounding only."""
    training = {"keep_gradient": "last", **training}
    clients = [tiny.client(i, count=3 + i, terms=[pull], training=training) for i in range(8)]
    rates = {"configure": lambda context, i: {"learning_rate": 0.05 * (i + 1)}}
    seen: list[dict[int, tuple]] = []

    def engine(make: object) -> tuple:
        found: dict[int, tuple] = {}

        def finish(update: object, job: object) -> object:
            found[update.client_id] = (update.vector_D, update.gradient_D, update.num_examples)
            return update

        run = tiny.engine(transport=make(finish), **rates)
        run.run(2)
        seen.append(found)
        return run.vector_D, run.history[-1]["clients/loss"]

    serial = engine(lambda finish: InProcess(tiny.model(), clients, finish=finish))
    grouped = engine(lambda f: GroupedInProcess(tiny.model(), clients, group_size=group_size, finish=f))
    torch.testing.assert_close(grouped[0], serial[0], atol=2e-6, rtol=0)
    assert grouped[1] == pytest.approx(serial[1], rel=1e-4)
    for i in range(8):
        torch.testing.assert_close(seen[1][i][0], seen[0][i][0], atol=2e-6, rtol=0)
        torch.testing.assert_close(seen[1][i][1], seen[0][i][1], atol=5e-6, rtol=0)
        assert seen[1][i][2] == seen[0][i][2] == 3 + i


def test_empty_client_and_empty_round() -> None:
    clients = [tiny.client(0), tiny.client(1, count=0)]
    transport = GroupedInProcess(tiny.model(), clients, group_size=2)
    engine = tiny.engine(transport=transport)
    assert engine.step(engine.vector_D, 0).context.dropped == []
    assert engine.step(engine.vector_D, 0, cohort=[]).context.updates == {}
    engine.sampling = Sampling(mode="fixed", size=1)
    engine.run(1)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="group_size must be >= 1"):
        GroupedInProcess(tiny.model(), [], group_size=0)
    cases = [
        ([tiny.client(0, prepare=lambda model, job: None)], None, "cannot be trained in a group"),
        ([tiny.client(0, training={"optimizer": "adamw"})], None, "training in groups knows optimizer='sgd'"),
        (
            [tiny.client(0), tiny.client(1)],
            lambda c, i: {"room.x": i},
            "need one config for a method's hooks",
        ),
    ]
    for clients, configure, words in cases:
        transport = GroupedInProcess(tiny.model(), clients, group_size=2)
        engine = tiny.engine(transport=transport, configure=configure)
        with pytest.raises(ValueError, match=words):
            engine.step(engine.vector_D, 0)
