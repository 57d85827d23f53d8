"""BLUR in the real Trainer: exact steps, accumulation, PEFT, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from hf_plugins.dp_fedavg import BLURCallback
from tests.hf_plugins.tiny_models import build, token_ids

pytestmark = pytest.mark.host


class Far(nn.Module):
    """Loss 0.5 ||w - a||^2, the dossier's quadratic."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))
        self.b = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        target = torch.tensor([3.0, 4.0, 0.5])
        return {"loss": 0.5 * ((self.w - target).square().sum() + (self.b + 0.25).square()) + 0 * x.sum()}


def train(model: nn.Module, folder: Path, callback: BLURCallback, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{
            "learning_rate": 0.1,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "max_steps": 10,
            "per_device_train_batch_size": 2,
            "report_to": [],
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            **options,
        },
    )
    data = [{"x": torch.tensor([float(i)])} for i in range(40)]
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback])
    trainer.train()
    return trainer


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ten_steps_are_the_golden_ones(tmp_path: Path, accumulation: int) -> None:
    """lambda 0.4, S = 1, eta 0.1, however gradients are accumulated: the dossier's ten steps."""
    model, callback = Far(), BLURCallback(1.0, 0.4)
    train(model, tmp_path, callback, gradient_accumulation_steps=accumulation)
    torch.testing.assert_close(
        model.w.detach(), torch.tensor([1.680163, 2.240217, 0.280027]), atol=2e-5, rtol=0
    )
    assert float(model.b.detach()) == pytest.approx(-0.140014, abs=2e-5)
    assert callback.distance(model) == pytest.approx(2.817719, abs=2e-5)


def test_without_strength_or_inside_the_ball_nothing_changes(tmp_path: Path) -> None:
    for callback in (BLURCallback(1.0, 0.0), BLURCallback(100.0, 4.0)):
        model = Far()
        train(model, tmp_path, callback)
        assert callback.distance(model) == pytest.approx(3.276898, abs=2e-5)


def test_only_adapters_are_held(tmp_path: Path) -> None:
    """LoRA with AdamW: the adapters stay nearer to where they began; the base does not move."""
    distances = []
    for strength in (0.0, 1e4):
        model = get_peft_model(build("llama", 2), LoraConfig(task_type="CAUSAL_LM", r=2))
        base = model.get_base_model().lm_head.weight.detach().clone()
        callback = BLURCallback(0.01, strength)
        ids = token_ids(8, 6)
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=12,
            learning_rate=1e-2,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        rows = [{"input_ids": row, "labels": row} for row in ids]
        Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback]).train()
        assert torch.equal(model.get_base_model().lm_head.weight, base)
        distances.append(callback.distance(model))
    assert distances[1] < 0.6 * distances[0]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="BLUR needs clipping_norm > 0 and strength >= 0"):
        BLURCallback(0.0)
    with pytest.raises(ValueError, match="hinge must be square or norm"):
        BLURCallback(1.0, hinge="cube")
    callback, state, control = BLURCallback(1.0), TrainerState(global_step=3), TrainerControl()
    arguments = TrainingArguments("x", report_to=[], use_cpu=True)
    with pytest.raises(RuntimeError, match="BLURCallback cannot go on from a checkpoint"):
        callback.on_train_begin(arguments, state, control, model=Far())
    arguments.fp16 = True
    with pytest.raises(RuntimeError, match="BLURCallback needs whole, unscaled gradients"):
        callback.on_train_begin(arguments, TrainerState(), control, model=Far())
