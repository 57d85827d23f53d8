"""The registered loss: options reach the formulas, wrong ones are named."""

import pytest
import torch
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS

from mm_plugins.lau import LocationAwareLoss
from mm_plugins.lau.location_loss import (
    location_targets,
    offset_guided_weight,
    offset_regression,
    pixel_loss,
)
from mm_plugins.lau.sampling import location_aware_upsample

GRID = {"scale": (2, 2), "base_grid": "half_pixel"}


def problem() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(2, 3, 4, 5, generator=generator)
    offset = 0.5 * torch.randn(2, 2, 8, 10, generator=generator)
    label = torch.randint(3, (2, 8, 10), generator=generator)
    label[:, 0] = 255
    own = pixel_loss(location_aware_upsample(x, offset, scale_factor=2, base_grid="half_pixel"), label)
    return x.requires_grad_(), offset.requires_grad_(), own, label


def test_regression_mode() -> None:
    x, offset, own, label = problem()
    options = {"lambda_": 0.7, "search_radius": 1, "margin": 0.01}
    init_default_scope("mmseg")
    loss = MODELS.build({"type": "LocationAwareLoss", "mode": "reg", "gamma": 0.2, **options})
    terms = loss(x, offset, own, label, **GRID)
    wanted = location_targets(x, offset, label, own, **options, **GRID)
    assert torch.equal(terms.weight, wanted.weight_NHW)
    torch.testing.assert_close(terms.regression, 0.2 * offset_regression(offset, wanted.offset_N2HW))
    assert terms.moved.item() == pytest.approx(wanted.moved_NHW.sum().item() / (label != 255).sum().item())
    terms.regression.backward()
    assert offset.grad is not None
    assert x.grad is None


@pytest.mark.parametrize("punish_ties", [True, False])
def test_offset_guided_mode(punish_ties: bool) -> None:
    x, _, _, label = problem()
    zero = torch.zeros(2, 2, 8, 10)
    own = pixel_loss(location_aware_upsample(x, zero, scale_factor=2, base_grid="half_pixel"), label)
    loss = LocationAwareLoss("off", lambda_=0.4, punish_ties=punish_ties)
    terms = loss(x, zero, own, label, **GRID)
    wanted = offset_guided_weight(x, label, own, lambda_=0.4, punish_ties=punish_ties, **GRID)
    assert torch.equal(terms.weight, wanted)
    assert terms.regression is None
    assert terms.moved.item() == float(punish_ties)


def test_other_label_is_ignored_on_request() -> None:
    x, offset, own, label = problem()
    terms = LocationAwareLoss()(x, offset, own, label.clamp(max=2), ignore_index=0, **GRID)
    assert (terms.weight[label == 0] == 1).all()


def test_nothing_labelled_divides_by_one() -> None:
    x, offset, own, label = problem()
    terms = LocationAwareLoss()(x, offset, own, torch.full_like(label, 255), **GRID)
    assert terms.moved.item() == 0
    assert terms.regression.item() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "on"}, "mode must be 'off' .* or 'reg'.*; got 'on'"),
        ({"lambda_": -1.0}, "lambda_, gamma and margin must be >= 0"),
        ({"gamma": -1.0}, "Leave lau.loss out to train without location loss"),
        ({"search_radius": 1.5}, "search_radius must be a whole number >= 0; got 1.5"),
    ],
)
def test_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocationAwareLoss(**options)


def test_one_offset_field_is_needed() -> None:
    x, offset, own, label = problem()
    with pytest.raises(ValueError, match="needs one offset field shared by all classes; got 3"):
        LocationAwareLoss()(x, offset.repeat(1, 3, 1, 1), own, label, **GRID)
