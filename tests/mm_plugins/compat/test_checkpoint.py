"""Checkpoints of mmengine's Runner load on torch >= 2.6; hostile pickles do not."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.optim.scheduler import OneCycleParamScheduler
from mmengine.runner import CheckpointLoader, Runner
from torch.utils.data import Dataset

import mm_plugins  # noqa: F401
from mm_plugins.compat.checkpoint import load_checkpoint, pickled_method


class Linear(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)  # The Runner seeds only after this model is made.
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, x: list[torch.Tensor], mode: str = "loss") -> dict[str, torch.Tensor]:
        return {"loss": self.layer(torch.stack(x)).square().mean()}


class Ones(Dataset):
    METAINFO = {"classes": ("a", "b")}

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.full((2,), float(index))}


def make_runner(work_dir: Path, max_epochs: int, **options: object) -> Runner:
    return Runner(
        model=Linear(),
        work_dir=str(work_dir),
        train_dataloader={
            "dataset": Ones(),
            "batch_size": 2,
            "num_workers": 0,
            "sampler": {"type": "DefaultSampler", "shuffle": True},
        },
        train_cfg={"by_epoch": True, "max_epochs": max_epochs},
        optim_wrapper={"optimizer": {"type": "AdamW", "lr": 0.1}},
        # `end` would otherwise be each run's own last iteration, and is part of what a checkpoint restores.
        param_scheduler=[
            {"type": "OneCycleLR", "eta_max": 0.1, "total_steps": 4, "end": 4, "by_epoch": False}
        ],
        custom_hooks=[{"type": "EMAHook"}],
        randomness={"seed": 0},
        **options,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that a real Runner wrote: log history, EMA, optimizer and a one-cycle schedule inside."""
    work_dir = tmp_path_factory.mktemp("run")
    make_runner(work_dir, 1, experiment_name="first").train()
    return work_dir / "epoch_1.pth"


@pytest.mark.host
def test_plain_torch_load_refuses_what_the_runner_wrote(checkpoint: Path) -> None:
    """The reason this module exists; should PyTorch or mmengine change, it can go."""
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(checkpoint)


@pytest.mark.host
def test_runner_checkpoint_loads_through_mmengine(checkpoint: Path) -> None:
    loaded = CheckpointLoader.load_checkpoint(str(checkpoint))
    assert set(loaded) >= {"state_dict", "optimizer", "message_hub", "param_schedulers", "ema_state_dict"}
    history = loaded["message_hub"]["log_scalars"]["train/loss"]
    assert isinstance(history, HistoryBuffer)
    assert history.mean() == pytest.approx(np.mean(history.data[0]))


@pytest.mark.host
def test_resumed_run_equals_uninterrupted(checkpoint: Path, tmp_path: Path) -> None:
    """One epoch and a resume give bit for bit what two epochs give; this goes through load and schedulers."""
    whole = make_runner(tmp_path / "whole", 2, experiment_name="whole")
    whole.train()
    resumed = make_runner(
        tmp_path / "resumed", 2, experiment_name="resumed", load_from=str(checkpoint), resume=True
    )
    resumed.train()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


class Hostile:
    def __reduce__(self) -> tuple:
        return os.system, ("exit 1",)


class NotAllowed:
    pass


class CallsGetattr:
    """A pickle that reaches for code through ``getattr``, the one function the loader replaces."""

    def __reduce__(self) -> tuple:
        return getattr, (torch.Tensor, "numpy")


@pytest.mark.parametrize("content", [Hostile(), NotAllowed(), CallsGetattr()], ids=lambda x: type(x).__name__)
def test_hostile_pickle_is_refused(content: object, tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "meta": content}, tmp_path / "x.pth")
    with pytest.raises(RuntimeError, match="allow the class before loading"):
        CheckpointLoader.load_checkpoint(str(tmp_path / "x.pth"))


def test_allow_list_is_gone_after_a_load(tmp_path: Path) -> None:
    """Outside of a load, plain ``torch.load`` trusts no more than before."""
    torch.save({"history": HistoryBuffer([1.0], [1])}, tmp_path / "x.pth")
    load_checkpoint(tmp_path / "x.pth")
    assert HistoryBuffer not in torch.serialization.get_safe_globals()


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Give the path of a .pth file"):
        load_checkpoint(tmp_path / "none.pth")


def test_cut_file_is_named(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.zeros(1000)}}, tmp_path / "x.pth")
    data = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(RuntimeError, match="Either the file is damaged"):
        load_checkpoint(tmp_path / "x.pth")


def test_getattr_is_narrow() -> None:
    assert pickled_method(HistoryBuffer, "mean") is HistoryBuffer.mean
    assert pickled_method(OneCycleParamScheduler, "_annealing_cos")
    for owner, name in ((HistoryBuffer, "__init__"), (os, "system")):
        with pytest.raises(ValueError, match="Do not load this file unless you trust its origin"):
            pickled_method(owner, name)
