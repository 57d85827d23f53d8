"""Clients with mmengine's Runner and with transformers' Trainer: configs act, and a search runs over them."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("mmengine")
pytest.importorskip("transformers")

from mmengine.config import Config
from mmengine.model import BaseModel
from transformers import TrainingArguments

from hf_plugins.hpn.client import APPLIED, VALUE, HPNClient, job_config
from hf_plugins.hpn.config import HPNConfig
from hf_plugins.hpn.dataset import make_encoder
from hf_plugins.hpn.server import Federation, HPNRun
from hf_plugins.hpn.space import Categorical, Space
from hf_plugins.hpn.trainer import RunnerClient
from hf_plugins.rounds import ClientFailed, InProcess, Job, TrainableVector, TrainerClient
from tests.hf_plugins.hpn import tiny

pytestmark = pytest.mark.host


class MMModel(BaseModel):
    """A classifier in mmengine's form; like any BaseModel it re-initialises in ``train()`` if it may."""

    def __init__(self) -> None:
        super().__init__(init_cfg={"type": "Constant", "layer": "Linear", "val": 0.0, "bias": 9.0})
        self.net = tiny.model()

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor | None = None, mode: str = "tensor") -> Any:
        logits = self.net(inputs)
        return {"loss": nn.functional.cross_entropy(logits, labels)} if mode == "loss" else logits


def _rows(part: Any, names: tuple[str, str] = ("inputs", "labels")) -> list[dict[str, torch.Tensor]]:
    return [dict(zip(names, row, strict=True)) for row in zip(*part, strict=True)]


def _runner_client(number: int, folder: Path) -> RunnerClient:
    train, validation, _ = tiny.parts(2)[number]

    def measure(model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            right = (model(validation[0]).argmax(dim=1) == validation[1]).double().mean()
        return {"accuracy": float(right), "num_examples": float(len(validation[0]))}

    cfg = Config(
        {
            "train_dataloader": {
                "batch_size": 8,
                "dataset": _rows(train),
                "sampler": {"type": "DefaultSampler", "shuffle": True},
                "collate_fn": {"type": "default_collate"},
            },
            "train_cfg": {"by_epoch": False, "max_iters": 3},
            "optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.05, "weight_decay": 0.0}},
        }
    )
    return RunnerClient(number, cfg, work_dir=str(folder), num_examples=len(train[0]), measure=measure)


def _hugging_face_client(number: int, folder: Path) -> TrainerClient:
    from transformers import BertConfig, BertForSequenceClassification  # noqa: F401

    generator = torch.Generator().manual_seed(number)
    rows = [
        {"input_ids": torch.randint(5, 20, (6,), generator=generator), "labels": torch.tensor(i % 2)}
        for i in range(12)
    ]
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=2, use_cpu=True, report_to=[]
    )

    def figures(prediction: Any) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    return TrainerClient(number, rows, args, eval_dataset=rows, trainer_kwargs={"compute_metrics": figures})


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=20
        )
    )


SENT = {"learning_rate": 0.02, "weight_decay": 0.01, "dropout": 0.25, "max_steps": 3}


@pytest.mark.parametrize("host", ["mmengine", "transformers"])
def test_every_value_is_in_force(tmp_path: Path, host: str) -> None:
    """Read back from the live optimizer, the model and the number of steps: lr, wd, dropout, steps, batch."""
    python, numpy = random.getstate(), np.random.get_state()[1].copy()
    if host == "mmengine":
        inner, model, sent = _runner_client(0, tmp_path), MMModel(), {**SENT, "batch_size": 6}
    else:
        inner, model = _hugging_face_client(0, tmp_path), _bert()
        sent = {**SENT, "per_device_train_batch_size": 3}
    weights = TrainableVector(model)
    job = Job(client_id=0, round_index=0, seed=5, config=job_config(sent))
    update = HPNClient(inner).train(weights, job)
    applied = {k.removeprefix(APPLIED): v for k, v in update.metrics.items() if k.startswith(APPLIED)}
    assert applied == sent
    assert 0 <= update.metrics[VALUE] <= 1
    assert float(update.vector_D.abs().max()) > 0
    assert random.getstate() == python
    assert np.array_equal(np.random.get_state()[1], numpy)


def test_runner_starts_from_the_round_and_repeats_itself(tmp_path: Path) -> None:
    """mmengine initialises weights in train(); the round's model must win. Bias 9 would show it."""
    weights = TrainableVector(MMModel())
    start = weights.read()
    job = Job(client_id=0, round_index=0, seed=5, config={"learning_rate": 1e-6})
    client = _runner_client(0, tmp_path)
    first = client.train(weights, job)
    assert float(first.vector_D.abs().max()) < 1e-4
    weights.write_(start)
    torch.manual_seed(99)
    assert torch.equal(client.train(weights, job).vector_D, first.vector_D)


@pytest.mark.parametrize("host", ["mmengine", "transformers"])
def test_a_search_over_clients_of_the_host(tmp_path: Path, host: str) -> None:
    config = HPNConfig(num_rounds=1, num_steps=2, encoding_epsilon=None)
    encoder = make_encoder(config, num_labels=3, public=torch.randn(9, 6))
    make = _runner_client if host == "mmengine" else _hugging_face_client
    examples = [part[0] for part in tiny.parts(2)]
    clients = [
        HPNClient(make(k, tmp_path / str(k)), encoder=encoder, examples=lambda k=k: examples[k])
        for k in range(2)
    ]
    transport = InProcess(MMModel() if host == "mmengine" else _bert(), clients)
    space = Space(
        {"learning_rate": Categorical(choices=(0.01, 0.1)), "dropout": Categorical(choices=(0.0, 0.5))}
    )
    federation = Federation(transport=transport, initial_D=transport.weights.read())
    run = HPNRun(federation, space, config, tmp_path / "run", progress=False)
    found = run.search()
    result = run.deploy(found)
    assert sorted(found) == [0, 1]
    assert result["records"] == "validation"
    assert all(0 <= c["personal"] <= 1 for c in result["clients"].values())


def test_what_is_refused(tmp_path: Path) -> None:
    client = _runner_client(0, tmp_path)
    job = Job(client_id=0, round_index=0, seed=0, config={"gamma": 1.0})
    with pytest.raises(
        ValueError, match=r"'gamma' has no place in a runner's config; .*Give RunnerClient paths="
    ):
        client.round_config(job)
    client.paths["gamma"] = "param_scheduler.gamma"
    with pytest.raises(
        ValueError,
        match="'gamma'.* belongs at .*param_scheduler.gamma, but the config has no .*param_scheduler",
    ):
        client.round_config(job)
    client.measure = None
    with pytest.raises(ClientFailed, match="client 0 has no validation records"):
        client.evaluate(TrainableVector(MMModel()), job)
