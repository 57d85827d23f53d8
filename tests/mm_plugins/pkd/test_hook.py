"""Distillation attached by a hook."""

from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.runner import Runner

from mm_plugins.pkd.hook import PKDHook
from tests.mm_plugins.pkd import tiny
from tests.mm_plugins.pkd.conftest import Lesson, Trained


def test_options_are_checked_at_once() -> None:
    """No adapters and no inheriting, and no misspelt option."""
    with pytest.raises(ValueError, match="Use model=dict.type='PKDDetector'"):
        PKDHook({"teacher": "x", "adapt": "conv1x1"})
    with pytest.raises(ValueError, match="distill.inherit=.*needs the model before the optimizer is built"):
        PKDHook({"teacher": "x", "inherit": ("neck",)})
    with pytest.raises(TypeError, match="Did you mean 'teacher_ckpt'?"):
        PKDHook({"teacher": "x", "teacher_chpt": "y"})


@pytest.mark.host
def test_equals_the_detector_bit_for_bit(lesson: Lesson, trained: Trained, tmp_path: Path) -> None:
    """The plain config with the hook ends with the weights of the PKDDetector config."""
    distill = {"teacher": {"model": lesson.teacher}, "teacher_ckpt": str(lesson.ckpt)}
    hooks = [{"type": "PKDHook", "distill": distill}]
    runner = tiny.runner(tiny.retinanet(), lesson.data, tmp_path, custom_hooks=hooks)
    runner.train()
    assert tiny.equal_states(runner.model.state_dict(), trained.weights)


@pytest.mark.host
def test_needs_a_config_and_a_plain_model(lesson: Lesson, tmp_path: Path) -> None:
    model = tiny.distilled(tiny.retinanet(), lesson.teacher, lesson.ckpt)
    runner: Runner = tiny.runner(model, lesson.data, tmp_path)
    hook = PKDHook({"teacher": {"model": lesson.teacher}, "teacher_ckpt": str(lesson.ckpt)})
    with pytest.raises(ValueError, match="which distils already. Remove the hook"):
        hook.before_train(runner)
    runner = tiny.runner(tiny.retinanet(), lesson.data, tmp_path)
    runner.cfg = Config({})
    with pytest.raises(ValueError, match="Build it with Runner.from_cfg"):
        hook.before_train(runner)
