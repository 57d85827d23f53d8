"""Callbacks: a checkpoint is sealed and its plain files are gone; progress and label reach the logs."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl

from hf_plugins.tee_split.callback import ReportProgress, SealCheckpoints
from hf_plugins.tee_split.config import SPFConfig
from hf_plugins.tee_split.model import split_model
from hf_plugins.tee_split.peft import apply_spf
from hf_plugins.tee_split.storage import SealedStore
from tests.hf_plugins.tee_split.tiny import tiny_model


def test_checkpoint_is_sealed_and_removed(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "checkpoint-7"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("secret state of the run")
    model = split_model(tiny_model(), 2, "server")
    layers = apply_spf(model, SPFConfig(ratio=0.5))
    store, control = SealedStore(tmp_path / "store", bytes(32)), TrainerControl()
    callback = SealCheckpoints(store, "label of the run")
    args = SimpleNamespace(output_dir=str(tmp_path / "out"))
    state = SimpleNamespace(global_step=7, is_world_process_zero=True)
    assert callback.on_save(args, state, control, model=model) is control
    assert not folder.exists()
    metadata, tensors = store.read("checkpoint")
    assert metadata == {"step": 7, "label": "label of the run"}
    assert bytes(tensors["files/state.json"].tolist()) == b"secret state of the run"
    assert {name for name in tensors if name.startswith("spf/")} == {
        f"spf/{name}.{part}" for name in layers for part in ("spf_delta", "spf_rows")
    }
    assert b"secret state" not in (store.folder / "checkpoint.sealed").read_bytes()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    store = SealedStore(tmp_path, bytes(32))
    state = SimpleNamespace(global_step=1, is_world_process_zero=False)
    SealCheckpoints(store, "x").on_save(SimpleNamespace(output_dir="-"), state, TrainerControl(), model=None)
    assert "checkpoint" not in store


@pytest.mark.parametrize("hardware", [True, False])
def test_progress_and_label(hardware: bool) -> None:
    told: list[dict] = []
    callback = ReportProgress(lambda **progress: told.append(progress), provider="sgx", hardware=hardware)
    state = SimpleNamespace(global_step=3, max_steps=10)
    logs = {"loss": torch.tensor(1.5)}
    callback.on_step_end(None, state, TrainerControl())
    callback.on_log(None, state, TrainerControl(), logs=logs)
    callback.on_log(None, state, TrainerControl(), logs={"epoch": 1})
    assert told == [{"step": 3, "num_steps": 10}, {"loss": 1.5}]
    assert logs["tee_split/provider"] == "sgx"
    assert logs["tee_split/hardware"] is hardware
