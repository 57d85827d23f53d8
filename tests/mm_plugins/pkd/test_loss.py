"""The registered losses: the authors' signature, sums over levels, and what they refuse."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mm_plugins  # noqa: F401
from mm_plugins.pkd.loss import ImitationLoss, PKDLoss, PlainMSELoss
from tests.mm_plugins.pkd.reference import correlation_loops, pkd_tensors


def pyramid(*sizes: int, seed: int = 0, num_channels: int = 4) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, num_channels, size, size, generator=generator) for size in sizes)


def test_registered_with_the_authors_arguments() -> None:
    from mmdet.registry import MODELS

    loss = MODELS.build({"type": "PKDLoss", "loss_weight": 6.0, "resize_stu": False})
    assert (loss.loss_weight, loss.resize_stu, loss.sync_stats) == (6.0, False, False)
    assert PKDLoss(2.0, True).loss_weight == 2.0
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        PKDLoss(weight=3.0)


def test_weight_and_sum_over_levels() -> None:
    """Fact 5: four levels with weight 6 give 6 times the sum of the authors' form; a tensor is one level."""
    students, teachers = pyramid(16, 8, 4, 2), pyramid(16, 8, 4, 2, seed=1)
    expected = 6 * sum(float(pkd_tensors(s, t)) for s, t in zip(students, teachers, strict=True))
    assert float(PKDLoss(loss_weight=6.0)(students, teachers)) == pytest.approx(expected, rel=1e-6)
    single = float(PKDLoss()(students[0], teachers[0]))
    assert single == pytest.approx(float(pkd_tensors(students[0], teachers[0])), rel=1e-6)


def test_untrained_total_over_four_levels() -> None:
    """2.7: unrelated features give about 1 a level, so about 24 in all at weight 6."""
    students, teachers = (
        pyramid(32, 32, 32, 32, num_channels=32),
        pyramid(32, 32, 32, 32, seed=1, num_channels=32),
    )
    assert float(PKDLoss(6.0)(students, teachers)) == pytest.approx(24, abs=0.3)


def test_unequal_numbers_of_levels() -> None:
    """Fact 5: the authors' zip would drop the last level without a word."""
    with pytest.raises(ValueError, match="got 4 and 3.*Pass only the levels that belong together"):
        PKDLoss()(pyramid(8, 4, 2, 2), pyramid(8, 4, 2))
    with pytest.raises(ValueError, match="both be a tensor or both a tuple .*Wrap the single map"):
        PKDLoss()(pyramid(8)[0], pyramid(8))


@pytest.mark.parametrize("kind", [PKDLoss, PlainMSELoss])
def test_which_map_is_resized(kind: type[ImitationLoss]) -> None:
    """Fact 6: the student by default, else the teacher; gradient reaches the map as it was given."""
    (s,), (t,) = pyramid(4), pyramid(8, seed=1)
    s.requires_grad_()
    up, down = (F.interpolate(x, size, mode="bilinear") for x, size in ((s, (8, 8)), (t, (4, 4))))
    assert kind()(s, t).item() == pytest.approx(kind()(up, t).item(), rel=1e-6)
    assert kind(resize_stu=False)(s, t).item() == pytest.approx(kind()(s, down).item(), rel=1e-6)
    (grad,) = torch.autograd.grad(kind()(s, t), s)
    assert grad.shape == s.shape
    assert float(grad.abs().sum()) > 0


def test_levels_report_correlation_and_dead_channels() -> None:
    """The mean of r leaves dead channels out."""
    students, teachers = pyramid(8, 4), pyramid(8, 4, seed=1)
    students[1][:, 2] = 0.3
    first, second = PKDLoss(3.0).levels(students, teachers)
    r = correlation_loops(students[0], teachers[0])
    assert float(first.correlation) == pytest.approx(sum(r) / 4, abs=1e-6)
    assert (float(first.num_dead), float(second.num_dead)) == (0, 1)
    r = correlation_loops(students[1][:, [0, 1, 3]], teachers[1][:, [0, 1, 3]])
    assert float(second.correlation) == pytest.approx(sum(r) / 3, abs=1e-6)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("kind", [PKDLoss, PlainMSELoss])
def test_teacher_that_is_not_finite(kind: type[ImitationLoss], bad: float) -> None:
    """Fact 7: the level is named."""
    students, teachers = pyramid(8, 4), pyramid(8, 4, seed=1)
    teachers[1][0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match="hold inf or NaN at: P4. Run the teacher in fp32"):
        kind().levels(students, teachers, names=["P3", "P4"])


def test_channels_that_differ_name_the_level() -> None:
    """Fact 7: both channel counts, the level and the mending."""
    with pytest.raises(
        ValueError, match=r"level 1: .*\(2, 4, 4, 4\) and \(2, 5, 4, 4\).*distill.adapt='conv1x1'"
    ):
        PKDLoss()((*pyramid(8), *pyramid(4)), (*pyramid(8), *pyramid(4, num_channels=5)))


def test_single_position_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    """Fact 7: n = 1 gives 0 with a finite gradient and one warning that says what to change."""
    from mmengine.logging import MMLogger

    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    s, t = (torch.rand(1, 3, 1, 1) for _ in range(2))
    s.requires_grad_()
    loss = PKDLoss()
    for _ in range(2):
        value = loss(s, t)
    value.backward()
    logger.removeHandler(caplog.handler)
    assert (value.item(), float(s.grad.abs().sum())) == (0, 0)
    warnings = [x.message for x in caplog.records if x.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "leave the coarse level out of distill.levels" in warnings[0]


@pytest.mark.parametrize("weight", [-1.0, float("nan")])
def test_weight_must_not_be_negative(weight: float) -> None:
    with pytest.raises(ValueError, match="Use 6.0 for a two-stage teacher and 10.0 for a one-stage teacher"):
        PKDLoss(loss_weight=weight)


def test_half_precision_and_autocast() -> None:
    """Fact 8, through the registered class."""
    students, teachers = (tuple(x.bfloat16() for x in pyramid(8, 4, seed=seed)) for seed in (0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = PKDLoss()(students, teachers)
    full = PKDLoss()(tuple(x.float() for x in students), tuple(x.float() for x in teachers))
    assert half.dtype == torch.float32
    assert half.item() == full.item()


def test_sync_stats_in_one_process_changes_nothing() -> None:
    students, teachers = pyramid(8, 4), pyramid(8, 4, seed=1)
    assert PKDLoss(sync_stats=True)(students, teachers) == PKDLoss()(students, teachers)


def test_plain_mse_is_the_mean_square() -> None:
    """The control arm: no standardisation, fp32, weight as given; with a mask only the kept positions."""
    students, teachers = pyramid(8, 4), pyramid(8, 4, seed=1)
    expected = 2 * sum(float(F.mse_loss(s, t)) for s, t in zip(students, teachers, strict=True))
    assert float(PlainMSELoss(2.0)(students, teachers)) == pytest.approx(expected, rel=1e-6)
    assert float(PlainMSELoss()(3 * students[0], 3 * teachers[0])) == pytest.approx(
        9 * float(F.mse_loss(students[0], teachers[0])), rel=1e-6
    )
    valid = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    valid[:, :, :2] = True
    (level,) = PlainMSELoss().levels(students[:1], teachers[:1], valid=[valid])
    assert float(level.loss) == pytest.approx(
        float(F.mse_loss(students[0][:, :, :2], teachers[0][:, :, :2])), rel=1e-6
    )
    (same,) = PKDLoss().levels(students[:1], teachers[:1])
    (control,) = PlainMSELoss().levels(students[:1], teachers[:1])
    assert control.correlation == same.correlation


def test_a_loss_must_say_how_it_compares() -> None:
    with pytest.raises(NotImplementedError, match="ImitationLoss.* must implement pair"):
        ImitationLoss().levels(pyramid(4), pyramid(4))
