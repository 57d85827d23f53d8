"""The callback inside a real Trainer."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_plugins.embed_parrot.callback import LeakageCallback
from hf_plugins.embed_parrot.defences import GaussianNoise
from tests.hf_plugins.embed_parrot.tiny import llama

pytestmark = pytest.mark.host
IDS = torch.randint(0, 384, (160, 12), generator=torch.Generator().manual_seed(0))


def _callback(**options: object) -> LeakageCallback:
    return LeakageCallback(2, list(IDS[:140]), list(IDS[140:]), **options)


def test_evaluations_report_the_leak(tmp_path: Path) -> None:
    model = llama()
    rows = Dataset.from_dict({"input_ids": IDS[:16].tolist(), "labels": IDS[:16].tolist()})
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    callback = _callback(every=2)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=default_data_collator,
        callbacks=[callback],
    )
    trainer.train()
    logged = [row for row in trainer.state.log_history if "embed_parrot/token_acc@2/ridge" in row]
    assert [row["step"] for row in logged] == [1, 3]
    assert all(row["embed_parrot/token_acc@2/ridge"] > 0.5 for row in logged)
    assert "embed_parrot/token_acc@2/hei" in trainer.evaluate()


def test_attack_leaves_the_model_as_it_was() -> None:
    model = llama().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = _callback().attack(model)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    # Random weights of spread .02 hardly mix: both read nearly all at layer 2.
    assert found["embed_parrot/token_acc@2/hei"] > 0.5
    assert found["embed_parrot/token_acc@2/ridge"] > 0.5


def test_noise_is_seen_in_the_figure() -> None:
    plain, noisy = _callback().attack(llama()), _callback(defence=GaussianNoise(ratio=20.0)).attack(llama())
    assert noisy["embed_parrot/token_acc@2/ridge"] < 0.2 < plain["embed_parrot/token_acc@2/ridge"]


@pytest.mark.parametrize(
    ("fit", "test", "every"), [([], [IDS[0]], 1), ([IDS[0]], [], 1), ([IDS[0]], [IDS[1]], 0)]
)
def test_needs_text(fit: list, test: list, every: int) -> None:
    with pytest.raises(ValueError, match="the callback needs texts to fit and to attack and every >= 1"):
        LeakageCallback(1, fit, test, every=every)
