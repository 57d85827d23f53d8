import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_plugins.data_ops import with_row_ids
from hf_plugins.dpf_cm import trainer
from hf_plugins.dpf_cm.dataset import DIALOGUE, PAIR, TEXT
from hf_plugins.dpf_cm.trainer import (
    folds,
    reward,
    small_model,
    stage_options,
    train_cpt,
    train_dpo,
    train_reward_models,
    train_sft,
)

SIZES = {"hidden_size": 32, "num_layers": 2, "vocabulary": 400}
FAST: dict[str, Any] = {
    "per_device_train_batch_size": 4, "max_steps": 2, "max_length": 64, "disable_tqdm": True,
    "logging_steps": 1,
}  # fmt: skip
TEXTS = ["头痛三天怎么办，请多休息。", "咳嗽有痰需要检查肺部。", "血压高要少吃盐。"] * 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(TEXTS, tmp_path_factory.mktemp("m") / "base", SIZES, 0)


def dialogues() -> Dataset:
    rows = [
        {"question": f"{t[:5]}{i}", "answer": t, "instruction": None, "history": [], "source": "x"}
        for i, t in enumerate(TEXTS)
    ]
    return with_row_ids(Dataset.from_list(rows, features=DIALOGUE))


def pairs(count: int = 10) -> Dataset:
    rows = [
        {"prompt": f"问{i}", "chosen": "好" * (i + 2), "rejected": "差", "history": [], "source": "x"}
        for i in range(count)
    ]
    return with_row_ids(Dataset.from_list(rows, features=PAIR))


def test_options_close_the_traps() -> None:
    cpt = stage_options("cpt", {}, 3)
    # trl would cut at 1024 tokens and throw away what a pack cannot hold.
    assert (cpt["packing_strategy"], cpt["max_length"], cpt["seed"]) == ("wrapped", 2048, 3)
    assert stage_options("rm", {}, 0)["learning_rate"] == 1e-5
    assert stage_options("dpo", {"beta": 0.3}, 0)["beta"] == 0.3
    with pytest.raises(ValueError, match="sft: SFTConfig has no option epochs.*; see trl's documentation"):
        stage_options("sft", {"epochs": 3}, 0)


def test_small_model_is_repeatable(base: Path, tmp_path: Path) -> None:
    again = small_model(TEXTS, tmp_path / "b", SIZES, 0)
    other = small_model(TEXTS, tmp_path / "c", SIZES, 1)
    weights = [(p / "model.safetensors").read_bytes() for p in (base, again, other)]
    assert weights[0] == weights[1] != weights[2]
    assert small_model([], base, SIZES, 9) == base
    with pytest.raises(ValueError, match="init_model has no layers; it takes hidden_size, num_layers"):
        small_model(TEXTS, tmp_path / "d", {"layers": 2}, 0)


def test_folds_are_even_and_ignore_order() -> None:
    data = pairs(23)
    fold = folds(data, 5)
    assert sorted(np.bincount(fold)) == [4, 4, 5, 5, 5]
    turned = data.select(range(22, -1, -1))
    assert (folds(turned, 5)[::-1] == fold).all()


@pytest.mark.host
def test_stages_run_once_and_resume(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Dataset.from_list([{"text": t * 5, "source": "x"} for t in TEXTS], features=TEXT)
    cpt = train_cpt(base, text, tmp_path, FAST, seed=0)
    sft = train_sft(cpt, dialogues(), tmp_path, FAST, seed=0)
    assert (sft / "stage.json").is_file()
    assert not (sft / "checkpoints").exists()
    weights = (sft / "model.safetensors").read_bytes()
    # Finished: nothing is trained again. Other data or options: another folder.
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "SFTTrainer", None)
        assert train_sft(cpt, dialogues(), tmp_path, FAST, seed=0) == sft
    assert train_sft(cpt, dialogues().select(range(6)), tmp_path, FAST, seed=0) != sft
    # Killed behind its first checkpoint: the rest is trained, and the weights are those of an unbroken run.
    slow = FAST | {"save_steps": 1}

    class Killed(Exception):
        pass

    original = trainer.SFTTrainer

    class Dies(original):  # type: ignore[misc, valid-type]
        def train(self, **options: Any) -> Any:
            self.args.max_steps = 1
            super().train(**options)
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "SFTTrainer", Dies)
        with pytest.raises(Killed):
            train_sft(cpt, dialogues(), tmp_path / "k", slow, seed=0)
    resumed = train_sft(cpt, dialogues(), tmp_path / "k", slow, seed=0)
    assert '"resumed": true' in (resumed / "stage.json").read_text()
    assert (resumed / "model.safetensors").stat().st_size == len(weights)


@pytest.mark.host
def test_reward_models_cross_fit_and_in_sample(base: Path, tmp_path: Path) -> None:
    data = pairs()
    folders, margins = train_reward_models(base, data, tmp_path, FAST, count=2, cross_fit=True)
    assert len(folders) == 2
    # Each pair is scored by exactly the model that did not train on it.
    assert (np.isnan(margins) == (folds(data, 2)[:, None] != np.arange(2)[None])).all()
    _, all_margins = train_reward_models(base, data, tmp_path, FAST, count=2, cross_fit=False)
    assert not np.isnan(all_margins).any()
    assert (all_margins[:, 0] != all_margins[:, 1]).any()
    swapped = data.map(lambda r: {"chosen": r["rejected"], "rejected": r["chosen"]})
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(str(folders[0]), num_labels=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(folders[0]))
    one = reward(model, tokenizer, data, "chosen", 64) - reward(model, tokenizer, data, "rejected", 64)
    two = reward(model, tokenizer, swapped, "chosen", 64) - reward(model, tokenizer, swapped, "rejected", 64)
    np.testing.assert_allclose(one, -two, atol=1e-6)
    same = data.map(lambda r: {"rejected": r["chosen"]})
    gap = reward(model, tokenizer, same, "chosen", 64) - reward(model, tokenizer, same, "rejected", 64)
    assert (gap == 0).all()


@pytest.mark.host
def test_first_losses_are_log_two(base: Path, tmp_path: Path) -> None:
    """A zeroed score head ranks nothing: -log sigmoid(0) = ln 2; DPO against its copy starts there too."""
    import json

    folder = train_dpo(base, pairs(), tmp_path, FAST | {"max_steps": 1}, seed=0)
    first = json.loads((folder / "stage.json").read_text())["losses"][0]
    assert float(first) == pytest.approx(math.log(2), abs=1e-4)
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    model = AutoModelForSequenceClassification.from_pretrained(str(base), num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    model.config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        model.score.weight.zero_()
    options = stage_options("rm", FAST | {"max_steps": 1, "center_rewards_coefficient": None}, 0)
    host = RewardTrainer(
        model, args=RewardConfig(output_dir=str(tmp_path / "rm"), **options),
        train_dataset=trainer.pair_rows(pairs()), processing_class=tokenizer,
    )  # fmt: skip
    host.train()
    losses = [float(entry["loss"]) for entry in host.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
