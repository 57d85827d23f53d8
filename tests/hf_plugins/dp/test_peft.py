"""Model and data of a recipe."""

import json
from pathlib import Path

import pytest

from hf_plugins.dp.config import DPConfig, RunConfig
from hf_plugins.dp.peft import add_lora, read_records, recipe_trainer, tokenize
from tests.hf_plugins.dp import tiny
from tests.hf_plugins.dp.words import tokenizer


def _run(folder: Path, **options: object) -> RunConfig:
    path = folder / "rows.jsonl"
    rows = [{"text": "w3 w4 w5", "label": i % 2, "who": f"u{i % 3}"} for i in range(8)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return RunConfig(model=str(folder / "model"), train_file=str(path), **options)


def test_columns_and_files_are_checked(tmp_path: Path) -> None:
    run = _run(tmp_path, text_column="body")
    with pytest.raises(ValueError, match="Set text_column and label_column"):
        read_records(run.train_file, run)
    with pytest.raises(FileNotFoundError, match="give train_file and eval_file as paths of JSON lines"):
        read_records(str(tmp_path / "no.jsonl"), run)


def test_user_column_survives_and_texts_are_cut(tmp_path: Path) -> None:
    run = _run(tmp_path, max_length=2)
    rows = tokenize(read_records(run.train_file, run), run, tokenizer(), "who")
    assert rows["input_ids"][0] == [3, 4]
    assert rows["labels"][:2] == [0, 1]
    assert set(rows["who"]) == {"u0", "u1", "u2"}


def test_adapters_are_on_all_linear_layers_of_the_body(tmp_path: Path) -> None:
    model = add_lora(tiny.bert(), _run(tmp_path, lora_rank=3))
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("attention.self.query.lora_A" in n for n in names)
    assert all("lora_" in n or "classifier" in n for n in names)
    plain = tiny.bert()
    assert add_lora(plain, _run(tmp_path)) is plain


@pytest.mark.host
def test_causal_recipe_by_user_trains(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    run = _run(tmp_path, label_column=None, max_length=4, lora_rank=2)
    dp = DPConfig(noise_multiplier=1.0, unit="user", user_column="who", max_records_per_user=2, seed=0)
    args = tiny.arguments(tmp_path / "out", per_device_train_batch_size=2, max_steps=2)
    trainer = recipe_trainer(run, args, dp)
    trainer.train()
    assert trainer.sample_rate == 2 / 3
    assert trainer.ledger.num_steps == 2
