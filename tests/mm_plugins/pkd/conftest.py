"""Shared fixtures: one dataset and one trained teacher for the whole room."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from mmengine.registry import DefaultScope, init_default_scope
from torch import Tensor

from tests.mm_plugins.pkd import tiny


class Lesson(NamedTuple):
    """A dataset, a teacher's model config and its checkpoint, written by a Runner."""

    data: Path
    teacher: dict
    ckpt: Path


class Trained(NamedTuple):
    """A distilled run of two epochs."""

    work_dir: Path
    weights: dict[str, Tensor]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Maps of a few pixels gain nothing from threads, and lose much where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _mmdet_scope() -> None:
    if DefaultScope.get_current_instance() is None:
        init_default_scope("mmdet")


@pytest.fixture(scope="session")
def lesson(tmp_path_factory: pytest.TempPathFactory) -> Lesson:
    """Fact 18: the teacher's checkpoint is one that mmengine's Runner wrote on this PyTorch."""
    data = tiny.write_dataset(tmp_path_factory.mktemp("data"))
    work_dir = tmp_path_factory.mktemp("teacher")
    tiny.runner(tiny.retinanet(), data, work_dir, randomness={"seed": 7}).train()
    return Lesson(data, tiny.retinanet(), work_dir / "epoch_2.pth")


@pytest.fixture(scope="session")
def trained(lesson: Lesson, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The lesson learnt by a student of the same shape."""
    work_dir = tmp_path_factory.mktemp("distilled")
    runner = tiny.runner(tiny.distilled(tiny.retinanet(), lesson.teacher, lesson.ckpt), lesson.data, work_dir)
    runner.train()
    return Trained(work_dir, copy.deepcopy(runner.model.state_dict()))
