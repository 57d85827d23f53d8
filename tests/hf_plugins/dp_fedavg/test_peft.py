"""Federated fine-tuning of adapters: users are Trainer clients, d is that of the adapters."""

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from hf_plugins.dp_fedavg import RunConfig
from hf_plugins.dp_fedavg.peft import TextUsers, read_rows
from hf_plugins.dp_fedavg.trainer import build_task, recipe_engine
from tests.hf_plugins.dp_fedavg.tiny import ROOT, config

pytestmark = pytest.mark.host


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A tiny random BERT with a vocabulary of characters."""
    folder = tmp_path / "encoder"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + [chr(c) for c in range(97, 123)]
    words += [f"##{chr(c)}" for c in range(97, 123)]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), vocab_file=str(folder / "vocab.txt")).save_pretrained(
        folder
    )
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForSequenceClassification(BertConfig(vocab_size=len(words), **size)).save_pretrained(folder)
    return folder


def recipe(encoder: Path, out: Path) -> tuple[RunConfig, dict]:
    run = RunConfig(
        task="text",
        data=str(ROOT / "tests" / "data" / "sms_spam"),
        output_dir=str(out),
        num_rounds=2,
        num_clients=12,
        model=str(encoder),
        lora_rank=2,
        max_length=12,
        max_records=4,
        max_test_records=10,
    )
    return run, {"learning_rate": 0.1, "optim": "sgd", "per_device_train_batch_size": 4, "use_cpu": True}


@pytest.mark.real
def test_adapters_of_real_messages_resume_and_stay_small(encoder: Path, tmp_path: Path) -> None:
    run, local = recipe(encoder, tmp_path / "run")
    dp = config(blur=0.4, keep_ratio=0.5, sample_rate=0.3, clipping_norm=0.1)
    task = build_task(run, local)
    whole = recipe_engine(task, run, dp, progress=False)
    base = {n: p.detach().clone() for n, p in task.model.named_parameters() if not p.requires_grad}
    whole.run(2)
    names = whole.transport.weights.names
    assert all("lora_" in name or "classifier" in name for name in names)
    assert len(whole.vector_D) < 500
    assert all(torch.equal(p, base[n]) for n, p in task.model.named_parameters() if n in base)
    assert whole.history[-1]["rounds/dropped"] == 0
    assert whole.history[-1]["clients/norm"] > 0
    assert 0 <= whole.history[-1]["test/accuracy"] <= 1
    again, _ = recipe(encoder, tmp_path / "again")
    first = recipe_engine(build_task(again, local), again, dp, progress=False)
    first.run(1)
    second = recipe_engine(build_task(again, local), again, dp, progress=False)
    second.run(2)
    assert torch.equal(second.vector_D, whole.vector_D)


def test_rows_need_text_and_label(tmp_path: Path, encoder: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"sentence": "x"}))
    with pytest.raises(ValueError, match="needs rows with text and label"):
        read_rows(tmp_path / "train.jsonl")
    run, local = recipe(encoder, tmp_path)
    users = TextUsers(run, local)
    assert len(users) == 12
    assert users.num_labels == 2
