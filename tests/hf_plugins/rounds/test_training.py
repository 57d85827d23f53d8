"""Local training: the plan of batches, options, terms, gradients."""

import pytest
import torch
from torch import Tensor

from hf_plugins.rounds import ClientFailed, Job, LocalTraining, TorchClient, TrainableVector
from hf_plugins.rounds.training import batches
from tests.hf_plugins.rounds import tiny


def job(**config: object) -> Job:
    return Job(client_id=1, round_index=0, seed=3, config=config)


def test_every_epoch_sees_every_record_once() -> None:
    plan = batches(10, LocalTraining(batch_size=4, num_epochs=2), seed=0)
    assert [len(rows) for rows in plan] == [4, 4, 2, 4, 4, 2]
    for epoch in (plan[:3], plan[3:]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(10))
    assert not torch.equal(torch.cat(plan[:3]), torch.cat(plan[3:]))
    assert len(batches(10, LocalTraining(batch_size=4, num_steps=4), seed=0)) == 4
    assert batches(0, LocalTraining(), seed=0) == []


def test_one_full_batch_is_one_gradient_step() -> None:
    """delta = -lr * gradient of the mean loss over all records."""
    model = tiny.model()
    weights = TrainableVector(model)
    start = weights.read()
    tiny.loss(model, tiny.records(1)).mean().backward()
    gradient = weights.read_gradient()
    weights.write_(start)
    client = tiny.client(1, training={"batch_size": 12, "keep_gradient": "last"})
    update = client.train(weights, job(learning_rate=0.5))
    torch.testing.assert_close(update.vector_D, -0.5 * gradient, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(update.gradient_D, gradient, atol=1e-7, rtol=1e-5)
    assert update.num_examples == 12


def test_learning_rate_decays_with_rounds() -> None:
    weights = TrainableVector(tiny.model())
    start = weights.read()
    norms = []
    for round_index in (0, 2):
        weights.write_(start)
        client = tiny.client(1, training={"batch_size": 12, "learning_rate_decay": 0.5})
        update = client.train(weights, Job(client_id=1, round_index=round_index, seed=0))
        norms.append(float(update.vector_D.norm()))
    assert norms[1] == pytest.approx(norms[0] / 4, rel=1e-4)


def test_full_gradient_is_that_of_all_records_at_the_end() -> None:
    model = tiny.model()
    weights = TrainableVector(model)
    update = tiny.client(1).train(weights, job(keep_gradient="full"))
    model.zero_grad()
    tiny.loss(model, tiny.records(1)).mean().backward()
    torch.testing.assert_close(update.gradient_D, weights.read_gradient(), atol=1e-7, rtol=1e-5)


def test_terms_see_the_distance_and_are_added() -> None:
    """With a zero task gradient a term of 2 * delta multiplies the distance by 1 - 2 lr in each step."""
    seen = []

    def term(delta: list[Tensor], config: dict, lead: int) -> list[Tensor] | None:
        seen.append((float(delta[0].norm()), lead, config["room.x"]))
        return None if len(seen) == 1 else [torch.ones_like(d) for d in delta]

    flat = TorchClient(
        0,
        (torch.zeros(4, 6), torch.zeros(4, dtype=torch.long)),
        loss=lambda model, batch: model(batch[0]).sum(1) * 0,
        training=LocalTraining(batch_size=2, num_steps=3, learning_rate=0.1),
        terms=[term],
    )
    weights = TrainableVector(tiny.model())
    update = flat.train(weights, job(**{"room.x": 7}))
    torch.testing.assert_close(update.vector_D, torch.full_like(update.vector_D, -0.2), atol=1e-6, rtol=0)
    assert seen[0] == (0.0, 0, 7)
    assert seen[2][0] == pytest.approx(0.1 * 30**0.5, rel=1e-5)


def test_empty_client_and_clipped_gradient() -> None:
    weights = TrainableVector(tiny.model())
    empty = tiny.client(1, count=0).train(weights, job())
    assert not empty.vector_D.any()
    assert empty.metrics == {}
    start = weights.read()
    update = tiny.client(1, training={"batch_size": 12}).train(weights, job(max_grad_norm=0.01))
    assert float(update.vector_D.norm()) == pytest.approx(0.1 * 0.01, rel=1e-3)
    weights.write_(start)
    adam = tiny.client(1, training={"batch_size": 12}).train(
        weights, job(optimizer="adamw", learning_rate=0.01)
    )
    assert float(adam.vector_D.abs().max()) == pytest.approx(0.01, rel=1e-2)


def test_prepare_runs_before_training_and_evaluation_needs_records() -> None:
    prepared = []
    client = tiny.client(1, prepare=lambda model, job: prepared.append(job.client_id))
    weights = TrainableVector(tiny.model())
    client.train(weights, job())
    assert prepared == [1]
    with pytest.raises(ClientFailed, match="has no validation records"):
        client.evaluate(weights, job())
    measured = tiny.client(
        1, validation=tiny.records(9), measure=lambda model, batch: {"right": float(len(batch[0]))}
    ).evaluate(weights, job())
    assert measured["num_examples"] == measured["right"] == 12


def test_refusals() -> None:
    with pytest.raises(ValueError, match="LocalTraining: .*momentum must lie in .*batch_size must be"):
        LocalTraining(momentum=1, batch_size=0)
    for wrong, words in {
        "learning_rate": "learning_rate must be a finite number > 0",
        "weight_decay": " must be >= 0; got -1",
        "batch_size": " must be >= 1; got -1",
        "momentum": "momentum must lie in ",
        "learning_rate_decay": "learning_rate_decay must lie in ",
    }.items():
        with pytest.raises(ValueError, match=words):
            LocalTraining(**{wrong: -1})
    with pytest.raises(ValueError, match=" must be one of sgd, adamw"):
        LocalTraining(optimizer="lion")
    with pytest.raises(
        ValueError, match="is no option of local training; it has .*Did you mean 'learning_rate'"
    ):
        LocalTraining().with_config({"learning_rat": 1.0})
    for wrong in ({"learning_rate": "1e-3"}, {"batch_size": 2.5}, {"optimizer": 3}):
        with pytest.raises(ValueError, match="YAML reads 1e-3 as text: write 1.0e-3"):
            LocalTraining().with_config(wrong)
    with pytest.raises(ValueError, match="records must be tensors of one length"):
        TorchClient(0, (torch.zeros(2), torch.zeros(3)), loss=tiny.loss)
