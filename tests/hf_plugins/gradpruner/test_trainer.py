"""Data, models and trainers of the command."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from trl import SFTConfig

from hf_plugins.gradpruner.config import GradPrunerConfig, RunConfig
from hf_plugins.gradpruner.storage import GradientHistory
from hf_plugins.gradpruner.trainer import (
    calibration_batches,
    collect,
    load_model,
    load_tokenizer,
    model_folder,
    num_labels,
    read_data,
)
from tests.hf_plugins.gradpruner.folders import causal_folder, classifier_folder, write_rows


def test_package_folders() -> None:
    import json as package

    assert model_folder("some/folder") == "some/folder"
    assert Path(model_folder("package:json/tool.py")) == Path(package.__file__).parent / "tool.py"
    with pytest.raises(ValueError, match="is not installed. Install it, or name a folder"):
        model_folder("package:no_such_package_here/model")


def test_rows_of_each_kind(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    rows = [{"q": "w3 w4", "a": "w5", "y": 0}, {"q": "w6", "a": "w7", "y": 2}]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    labelled = read_data(
        str(path), RunConfig(model="m", text_column="q", label_column="y"), option="train_file"
    )
    assert labelled[1] == {"text": "w6", "labels": 2}
    assert num_labels(labelled) == 3
    prompted = read_data(
        str(path), RunConfig(model="m", text_column="a", prompt_column="q"), option="train_file"
    )
    assert prompted[0] == {"prompt": "w3 w4\n", "completion": "w5"}
    plain = read_data(str(path), RunConfig(model="m", text_column="a"), option="train_file")
    assert plain[0] == {"text": "w5"}
    assert num_labels(plain) == 0
    with pytest.raises(ValueError, match="Set text_column, prompt_column or label_column"):
        read_data(str(path), RunConfig(model="m"), option="train_file")
    with pytest.raises(ValueError, match=" is not set; name a JSON-lines file with "):
        read_data(None, RunConfig(model="m"), option="train_file")


def test_models_and_tokenizers(tmp_path: Path) -> None:
    run = RunConfig(model=str(classifier_folder(tmp_path / "c")), label_column="label")
    assert load_model(run.model, run, 4).config.num_labels == 4
    folder = causal_folder(tmp_path / "l", pad_token=None)
    assert load_tokenizer(str(folder)).pad_token == "w1"
    assert load_model(str(folder), RunConfig(model="m"), 0).config.model_type == "llama"


def test_calibration_batches(tmp_path: Path) -> None:
    """Five rows asked, batches of two, no labels."""
    folder, data = causal_folder(tmp_path / "l"), write_rows(tmp_path / "rows.jsonl")
    run = RunConfig(model=str(folder), train_file=str(data), calibration_rows=5)
    args = SFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_length=4, bf16=False, use_cpu=True
    )
    batches = calibration_batches(run, args)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    assert batches[0]["input_ids"].shape[1] == 4
    assert "labels" not in batches[0]


@pytest.mark.host
def test_second_pass_keeps_donors_and_receivers_alone(tmp_path: Path) -> None:
    """history="scores" with a merge: the same factors as history="memory", for the merged layers only."""
    folder, data = causal_folder(tmp_path / "l"), write_rows(tmp_path / "rows.jsonl")
    run = RunConfig(model=str(folder), train_file=str(data), score_learning_rate=1e-2, lora_r=2)
    args = SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=5,
        per_device_train_batch_size=4,
        max_length=8,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    options = {"num_steps": 4, "layers": [1, 4], "n_merge": "1"}
    twice = collect(run, GradPrunerConfig(history="scores", **options), args)
    once = collect(run, GradPrunerConfig(**options), args)
    plan = once.plan()
    assert twice.plan() == plan
    kept = {layer for pair in plan.merged for layer in pair}
    assert isinstance(twice.history, GradientHistory)
    assert isinstance(once.history, GradientHistory)
    assert {layer for layer in range(6) if twice.history.modules(layer)} == kept
    donor = plan.merged[0][0]
    for got, want in zip(
        twice.history.factors(donor, "mlp.up_proj"), once.history.factors(donor, "mlp.up_proj"), strict=True
    ):
        assert torch.equal(got, want)
