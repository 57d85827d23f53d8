"""Clients that are transformers Trainers: options that really act, gradients, isolation."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_plugins.rounds import ClientFailed, Job, TrainableVector, TrainerClient
from hf_plugins.rounds.trainer_client import arguments_with

pytestmark = pytest.mark.host


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = x @ self.w
        return {"loss": (out - labels).square().mean(), "logits": out}


DATA = [{"x": torch.tensor([float(i), 1.0]), "labels": torch.tensor(2.0 * i)} for i in range(4)]


def client(folder: Path, **options: Any) -> TrainerClient:
    arguments = TrainingArguments(
        str(folder),
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        learning_rate=0.01,
        per_device_train_batch_size=4,
        num_train_epochs=1,
        use_cpu=True,
    )
    return TrainerClient(5, options.pop("data", DATA), arguments, **options)


def job(**config: Any) -> Job:
    return Job(client_id=5, round_index=2, seed=3, config=config)


def gradient_at(w: Tensor) -> Tensor:
    """d/dw mean((x w - y)^2) = 2 mean(x (x w - y))."""
    x, y = torch.stack([r["x"] for r in DATA]), torch.stack([r["labels"] for r in DATA])
    return 2 * (x * (x @ w - y)[:, None]).mean(0)


def test_one_step_by_hand_and_gradients(tmp_path: Path) -> None:
    weights = TrainableVector(Line())
    update = client(tmp_path).train(weights, job(keep_gradient="last"))
    torch.testing.assert_close(update.vector_D, -0.01 * gradient_at(torch.zeros(2)))
    torch.testing.assert_close(update.gradient_D, gradient_at(torch.zeros(2)))
    assert (update.client_id, update.round_index, update.num_examples) == (5, 2, 4)
    weights = TrainableVector(Line())
    full = client(tmp_path).train(weights, job(keep_gradient="full", learning_rate=0.02))
    torch.testing.assert_close(full.vector_D, -0.02 * gradient_at(torch.zeros(2)))
    torch.testing.assert_close(full.gradient_D, gradient_at(full.vector_D))


def test_terms_come_after_the_task_gradient(tmp_path: Path) -> None:
    calls = []

    def term(delta: list[Tensor], config: dict, lead: int) -> list[Tensor]:
        calls.append(config["room.x"])
        return [torch.ones_like(d) for d in delta]

    update = client(tmp_path, terms=[term]).train(TrainableVector(Line()), job(**{"room.x": 1}))
    torch.testing.assert_close(update.vector_D, -0.01 * (gradient_at(torch.zeros(2)) + 1))
    assert calls == [1]


def test_global_generators_belong_to_the_caller(tmp_path: Path) -> None:
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist()
    client(tmp_path).train(TrainableVector(Line()), job())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_prepare_and_evaluation(tmp_path: Path) -> None:
    seen = []
    one = client(
        tmp_path, prepare=lambda model, args, job: seen.append(args.learning_rate), eval_dataset=DATA
    )
    one.train(TrainableVector(Line()), job(learning_rate=0.5))
    assert seen == [0.5]
    found = one.evaluate(TrainableVector(Line()), job())
    # labels 0, 2, 4, 6 against 0: mean square 14.
    assert found["loss"] == pytest.approx(14.0)
    assert found["num_examples"] == 4
    with pytest.raises(ClientFailed, match="has no validation records"):
        client(tmp_path).evaluate(TrainableVector(Line()), job())
    empty = client(tmp_path, data=[]).train(TrainableVector(Line()), job())
    assert not empty.vector_D.any()


def test_config_keys_are_arguments_and_are_read_back(tmp_path: Path) -> None:
    base = TrainingArguments(str(tmp_path), use_cpu=True)
    changed = arguments_with(base, {"weight_decay": 0.5, "hpn.dropout": 0.1, "keep_gradient": "last"})
    assert changed.weight_decay == 0.5
    assert base.weight_decay == 0.0
    with pytest.raises(ValueError, match=" is no field of TrainingArguments.*; did you mean "):
        arguments_with(base, {"learning_rat": 1})

    class Stubborn(TrainingArguments):
        @property
        def weight_decay(self) -> float:  # type: ignore[override]
            return 0.0

        @weight_decay.setter
        def weight_decay(self, value: float) -> None:
            pass

    with pytest.raises(ValueError, match=" did not take: .* was set, "):
        arguments_with(Stubborn(str(tmp_path), use_cpu=True), {"weight_decay": 0.5})
    with pytest.raises(ValueError, match="keep_gradient must be one of none, last, full"):
        client(tmp_path).train(TrainableVector(Line()), job(keep_gradient="first"))
