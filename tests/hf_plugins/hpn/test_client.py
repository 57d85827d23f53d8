"""What a client was told is what acted: set, watched, reported; and what leaves it."""

from typing import Any

import pytest
import torch
from torch import nn

from hf_plugins.hpn.client import (
    APPLIED,
    APPLIERS,
    COUNT,
    ENCODE,
    ENCODING,
    VALUE,
    Applier,
    HPNClient,
    check_appliers,
    dropout_places,
    job_config,
    observe,
    register_applier,
    set_dropout_,
)
from hf_plugins.hpn.dataset import accuracy, cross_entropy
from hf_plugins.hpn.embedding import Encoder
from hf_plugins.hpn.space import Categorical, Space
from hf_plugins.rounds import ClientFailed, Job, LocalTraining, TorchClient, TrainableVector
from tests.hf_plugins.hpn import tiny


def _inner(**more: Any) -> TorchClient:
    train, validation, _ = tiny.parts(1)[0]
    options = {"loss": cross_entropy, "validation": validation, "measure": accuracy, **more}
    return TorchClient(0, train, training=LocalTraining(batch_size=8), **options)


def _job(config: dict[str, Any], round_index: int = 0) -> Job:
    return Job(client_id=0, round_index=round_index, seed=3, config=job_config(config))


@pytest.mark.parametrize("rate", [0.1, 1.0])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_every_value_is_read_back(rate: float, dropout: float) -> None:
    """Bug 3 of the release: dropout was set in the config and never in the model."""
    weights = TrainableVector(tiny.model())
    sent = {"learning_rate": rate, "weight_decay": 0.01, "momentum": 0.5, "dropout": dropout, "num_steps": 5}
    update = HPNClient(_inner()).train(weights, _job(sent))
    applied = {k.removeprefix(APPLIED): v for k, v in update.metrics.items() if k.startswith(APPLIED)}
    assert applied == sent
    assert weights.model[0].p == 0.1  # the shared model's own value is back


def test_epochs_batches_and_the_optimizer_are_read_back() -> None:
    weights = TrainableVector(tiny.model())
    sent = {"num_epochs": 2, "batch_size": 6, "optimizer": "adamw", "learning_rate": 0.01}
    update = HPNClient(_inner()).train(weights, _job(sent))
    assert update.metrics[APPLIED + "num_epochs"] == 2.0
    assert update.metrics[APPLIED + "batch_size"] == 6.0


def test_dropout_really_acts() -> None:
    found = []
    for dropout in (0.0, 0.0, 0.9):
        weights = TrainableVector(tiny.model())
        found.append(HPNClient(_inner()).train(weights, _job({"dropout": dropout})).vector_D)
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


class _Deaf(TorchClient):
    """Trains as it likes, as a client with the release's bug does."""

    def train(self, weights: TrainableVector, job: Job) -> Any:
        return super().train(
            weights, Job(client_id=0, round_index=0, seed=job.seed, config={"learning_rate": 0.5})
        )


def test_a_value_that_does_not_act_stops_the_run() -> None:
    train = tiny.parts(1)[0][0]
    deaf = HPNClient(_Deaf(0, train, loss=cross_entropy))
    with pytest.raises(RuntimeError, match=r"'learning_rate' did not act: 0.1 was sent and 0.5 was in force"):
        deaf.train(TrainableVector(tiny.model()), _job({"learning_rate": 0.1}))


def test_an_applier_that_misses_a_module_is_caught() -> None:
    """A dropout that keeps its own value makes two probabilities, which equal no sent one."""
    model = nn.Sequential(nn.Dropout(0.1), nn.Linear(6, 3), nn.Dropout(0.2))
    first_only = {"dropout": Applier(APPLIERS["dropout"].read, lambda m, value: setattr(m[0], "p", value))}
    client = HPNClient(_inner(), appliers={**APPLIERS, **first_only})
    with pytest.raises(RuntimeError, match="Mend its applier, or whatever overrides the value"):
        client.train(TrainableVector(model), _job({"dropout": 0.3}))


def test_local_model_is_measured_and_the_global_one_too() -> None:
    weights = TrainableVector(tiny.model())
    client = HPNClient(_inner())
    before = client.evaluate(weights, _job({}))
    update = client.train(weights, _job({"learning_rate": 1.0}))
    assert update.metrics[COUNT] == before[COUNT] == 18.0
    assert update.metrics[VALUE] == client.evaluate(weights, _job({}))[VALUE]
    assert update.metrics[VALUE] > before[VALUE]


def test_encoding_is_sent_once_and_the_same() -> None:
    """Being asked twice must not cost twice: one secret, one noise."""
    train = tiny.parts(1)[0][0]
    encoder = Encoder(kind="rff", num_labels=3, dim=6)
    client = HPNClient(_inner(), encoder=encoder, examples=lambda: train, noise_multiplier=2.0, secret=5)
    weights = TrainableVector(tiny.model())
    ask = Job(client_id=0, round_index=0, seed=0, config={ENCODE: True})
    first, second = client.evaluate(weights, ask), client.evaluate(weights, ask)
    assert first == second
    assert len(first) == 18
    assert all(key.startswith(ENCODING) for key in first)
    vector = torch.tensor([first[key] for key in sorted(first)], dtype=torch.float64)
    assert torch.equal(vector, client.encoding().vector)
    other = HPNClient(_inner(), encoder=encoder, examples=lambda: train, noise_multiplier=2.0, secret=6)
    assert not torch.equal(vector, other.encoding().vector)
    with pytest.raises(ClientFailed, match="client 0.* was given no encoder and examples"):
        HPNClient(_inner()).encoding()


def test_noise_on_values_has_the_stated_size_and_never_repeats() -> None:
    """18 records, multiplier 9: standard deviation 0.5. 400 models: 5 sigma of the estimate is 0.09."""
    client = HPNClient(_inner(), reward_noise_multiplier=9.0, secret=1)
    plain = HPNClient(_inner())
    weights = TrainableVector(tiny.model())
    noise = []
    for number in range(400):
        weights.write_(weights.read() + 1e-6 * (number + 1))
        noise.append(client.evaluate(weights, _job({}))[VALUE] - plain.evaluate(weights, _job({}))[VALUE])
    assert len(set(noise)) == 400
    assert float(torch.tensor(noise).std()) == pytest.approx(0.5, abs=0.09)
    assert client.evaluate(weights, _job({})) == client.evaluate(weights, _job({}))


def test_with_noise_nothing_leaves_without_it() -> None:
    """The training loss stays at home; only configs in force and the noisy figure are sent."""
    weights = TrainableVector(tiny.model())
    sent = HPNClient(_inner(), reward_noise_multiplier=1.0).train(weights, _job({"learning_rate": 0.1}))
    assert set(sent.metrics) == {APPLIED + "learning_rate", VALUE, COUNT}
    assert "loss" in HPNClient(_inner()).train(weights, _job({})).metrics


def test_observation_sees_only_its_own_model() -> None:
    model, other = tiny.model(), nn.Linear(2, 2)
    with observe(model) as seen:
        torch.optim.SGD(other.parameters(), lr=9.0).step()
        model.train()
        model(torch.zeros(7, 6))
        model.eval()
        model(torch.zeros(5, 6))
        torch.optim.Adam(model.parameters(), lr=0.25, weight_decay=0.5).step()
    assert (seen.num_steps, seen.optimizer, seen.batch_size, seen.num_records) == (1, "adam", 7, 7)
    assert (seen.option("lr"), seen.option("weight_decay")) == (0.25, 0.5)
    with observe(model) as again:
        pass
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert again.num_steps == 0  # hooks are gone


def test_dropout_of_modules_and_configs() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=11
    )
    model = transformers.BertForSequenceClassification(config)
    set_dropout_(model, 0.25)
    assert {getattr(owner, name) for owner, name in dropout_places(model)} == {0.25}
    assert model.config.hidden_dropout_prob == model.config.attention_probs_dropout_prob == 0.25
    assert model.dropout.p == 0.25


def test_registry() -> None:
    register_applier("hpn_test_only", Applier(lambda seen: seen.num_steps))
    try:
        check_appliers(Space({"hpn_test_only": Categorical(choices=(1,))}))
        with pytest.raises(
            ValueError, match="there is an applier for .*hpn_test_only.*; choose another name"
        ):
            register_applier("hpn_test_only", Applier(lambda seen: 0))
    finally:
        del APPLIERS["hpn_test_only"]
    with pytest.raises(ValueError, match="no applier for lora_r; there are .*Rename, or register_applier"):
        check_appliers(Space({"lora_r": Categorical(choices=(4, 8))}))


def test_what_is_refused() -> None:
    weights = TrainableVector(tiny.model())
    with pytest.raises(ValueError, match=r"no applier sets .*hpn.colour.* on a model; there are .*dropout"):
        HPNClient(_inner()).train(weights, Job(client_id=0, round_index=0, seed=0, config={"hpn.colour": 1}))
    with pytest.raises(ValueError, match="this model has no dropout to set; take dropout out of the space"):
        set_dropout_(nn.Linear(2, 2), 0.1)
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\); got .*1.5"):
        set_dropout_(tiny.model(), 1.5)
    with pytest.raises(
        ValueError, match="metric='f1'.* is not among what the clients measure: .*accuracy, loss"
    ):
        HPNClient(_inner(), metric="f1").evaluate(weights, _job({}))
    empty = TorchClient(0, (torch.zeros(0, 6), torch.zeros(0, dtype=torch.long)), loss=cross_entropy)
    with pytest.raises(ClientFailed, match="it took no optimizer step; has it any record?"):
        HPNClient(empty).train(weights, _job({"learning_rate": 0.1}))
