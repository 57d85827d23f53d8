"""The location losses against six literal log-softmaxes (acceptance facts 7-10)."""

import pytest
import torch
import torch.nn.functional as F

from mm_plugins.lau.location_loss import (
    candidate_steps,
    location_targets,
    offset_guided_weight,
    offset_regression,
    pixel_loss,
    two_sided,
)
from mm_plugins.lau.sampling import base_coordinates, location_aware_upsample
from tests.mm_plugins.lau import reference

F64 = torch.float64


def problem(
    scale: tuple[int, int] = (4, 3), classes: int = 5, seed: int = 0, sigma: float = 0.4
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(2, classes, 4, 5, generator=generator, dtype=F64)
    size = (4 * scale[0], 5 * scale[1])
    offset = sigma * torch.randn(2, 2, *size, generator=generator, dtype=F64)
    label = torch.randint(max(classes, 2), (2, *size), generator=generator)
    label[0, :3, :4] = 255
    return x.requires_grad_(), offset.requires_grad_(), label


@pytest.mark.parametrize(("scale", "seed"), [((4, 4), 0), ((2, 3), 1), ((3, 2), 2), ((8, 8), 3)])
def test_equals_the_literal_loss(scale: tuple[int, int], seed: int) -> None:
    """Main term, regression, Lambda, targets and both gradients, in fp64; radius 0, ties apart."""
    x, offset, label = problem(scale, seed=seed)
    sampled = location_aware_upsample(x, offset, scale_factor=scale)
    literal = reference.regression_loss(x, offset, sampled, label, scale, lambda_=0.3, gamma=0.1)
    own = pixel_loss(sampled, label)
    found = location_targets(x, offset, label, own.detach(), scale=scale, margin=1e-9)
    torch.testing.assert_close(found.weight_NHW, literal["weight"], atol=0, rtol=0)
    torch.testing.assert_close(found.offset_N2HW, literal["target"], atol=1e-12, rtol=0)
    main, regression = (own * found.weight_NHW).mean(), 0.1 * offset_regression(offset, found.offset_N2HW)
    torch.testing.assert_close(main, literal["main"], atol=1e-14, rtol=0)
    torch.testing.assert_close(regression, literal["regression"], atol=1e-14, rtol=0)
    ours = torch.autograd.grad(main + regression, (x, offset), retain_graph=True)
    theirs = torch.autograd.grad(literal["main"] + literal["regression"], (x, offset))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-14, rtol=0)


def test_ignored_pixels_add_no_gradient_but_count_in_the_mean() -> None:
    x, offset, label = problem()
    own = pixel_loss(location_aware_upsample(x, offset, scale_factor=(4, 3)), label)
    found = location_targets(x, offset, label, own.detach(), scale=(4, 3))
    ignored = label == 255
    assert (own[ignored] == 0).all()
    assert (found.weight_NHW[ignored] == 1).all()
    assert not found.moved_NHW[ignored].any()
    loss = (own * found.weight_NHW).mean() + offset_regression(offset, found.offset_N2HW)
    (d_offset,) = torch.autograd.grad(loss, offset)
    assert (d_offset.transpose(0, 1)[:, ignored] == 0).all()
    assert (d_offset.transpose(0, 1)[:, ~ignored] != 0).any()
    difference = (offset - found.offset_N2HW).abs()
    each = torch.where(difference < 1, 0.5 * difference.square(), difference - 0.5)
    torch.testing.assert_close(offset_regression(offset, found.offset_N2HW), each.sum() / offset.numel())


def test_ignored_pixels_never_move_whatever_their_loss() -> None:
    x, offset, label = problem()
    found = location_targets(x, offset, label, torch.full(label.shape, 99.0, dtype=F64), scale=(4, 3))
    assert torch.equal(found.moved_NHW, label != 255)


def test_nothing_labelled_gives_zero() -> None:
    x, offset, label = problem()
    label.fill_(255)
    own = pixel_loss(location_aware_upsample(x, offset, scale_factor=(4, 3)), label)
    found = location_targets(x, offset, label, own.detach(), scale=(4, 3))
    total = (own * found.weight_NHW).mean() + offset_regression(offset, found.offset_N2HW)
    assert total.item() == 0
    gradients = torch.autograd.grad(total, (x, offset))
    assert all((g == 0).all() for g in gradients)
    weight = offset_guided_weight(x, label, own, scale=(4, 3))
    assert (weight == 1).all()


@pytest.mark.parametrize("base_grid", ["asymmetric", "half_pixel", "align_corners"])
def test_moved_targets_are_whole_cells_nearby(base_grid: str) -> None:
    """base + target is a cell of the map; with p/k a target is at most (k-1)/k long on each axis."""
    x, offset, label = problem()
    own = pixel_loss(location_aware_upsample(x, offset, scale_factor=(4, 3), base_grid=base_grid), label)
    found = location_targets(x, offset, label, own.detach(), scale=(4, 3), base_grid=base_grid)
    assert 0.2 < found.moved_NHW.double().mean() < 1
    for axis, (cells, k) in enumerate(((4, 4), (5, 3))):
        start = base_coordinates(cells * k, cells, k, base_grid, x)
        start = start[:, None] if axis == 0 else start
        target = found.offset_N2HW[:, axis]
        place = (start + target)[found.moved_NHW]
        torch.testing.assert_close(place, place.round(), atol=1e-12, rtol=0)
        assert place.min() > -1e-9
        assert place.max() < cells - 1 + 1e-9
        if base_grid == "asymmetric":
            assert target[found.moved_NHW].abs().max() <= (k - 1) / k + 1e-12
        own_offset = offset[:, axis][~found.moved_NHW]
        assert torch.equal(target[~found.moved_NHW], own_offset)


def test_the_first_of_equal_candidates_wins() -> None:
    """Four cells with one and the same logits: all corners tie, and (floor, floor) is offered first.

    Pixel (1, 1) of k = 2 lies between all four cells; a target of (-1/2, -1/2) is the upper left one.
    """
    assert candidate_steps(0) == [(0, 0), (1, 0), (0, 1), (1, 1)]
    x = torch.tensor([3.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2).double()
    label = torch.zeros(1, 4, 4, dtype=torch.long)
    own = torch.full((1, 4, 4), 9.0, dtype=F64)
    found = location_targets(x, torch.zeros(1, 2, 4, 4, dtype=F64), label, own, scale=(2, 2))
    assert found.offset_N2HW[0, :, 1, 1].tolist() == [-0.5, -0.5]
    # Only the vertical neighbour is better: (ceil, floor) is (+1/2, -1/2).
    y = torch.zeros(1, 2, 2, 2, dtype=F64)
    y[0, 0, 1, 0] = 3.0
    found = location_targets(y, torch.zeros(1, 2, 4, 4, dtype=F64), label, own, scale=(2, 2))
    assert found.offset_N2HW[0, :, 1, 1].tolist() == [0.5, -0.5]


def test_no_better_candidate_keeps_the_offset_and_the_weight() -> None:
    x, offset, label = problem()
    found = location_targets(x, offset, label, torch.zeros(label.shape, dtype=F64), scale=(4, 3))
    assert torch.equal(found.offset_N2HW, offset.detach())
    assert (found.weight_NHW == 1).all()


def test_margin_holds_back_ties() -> None:
    x, offset, label = problem(sigma=0.0)
    own = pixel_loss(location_aware_upsample(x, offset, scale_factor=(4, 3)), label)
    strict = location_targets(x, offset, label, own.detach() + 1e-9, scale=(4, 3), margin=0.0)
    patient = location_targets(x, offset, label, own.detach() + 1e-9, scale=(4, 3), margin=1e-6)
    # On the cells themselves the sample is a candidate: with 1e-9 added, only a margin sees the tie.
    assert strict.moved_NHW[:, ::4, ::3][label[:, ::4, ::3] != 255].all()
    assert not patient.moved_NHW[:, -1, -1].any()
    assert patient.moved_NHW.sum() < strict.moved_NHW.sum()


def test_wider_search_is_never_worse_and_reaches_further() -> None:
    x, offset, label = problem()
    own = pixel_loss(location_aware_upsample(x, offset, scale_factor=(4, 3)), label).detach()
    assert [len(candidate_steps(r)) for r in (0, 1, 2)] == [4, 16, 36]
    near = location_targets(x, offset, label, own, scale=(4, 3))
    far = location_targets(x, offset, label, own, scale=(4, 3), search_radius=1)
    assert (far.moved_NHW | ~near.moved_NHW).all()

    def at(targets: torch.Tensor) -> torch.Tensor:
        return pixel_loss(location_aware_upsample(x.detach(), targets, scale_factor=(4, 3)), label)

    assert (at(far.offset_N2HW) <= at(near.offset_N2HW) + 1e-9).all()
    assert far.offset_N2HW[:, 0][far.moved_NHW].abs().max() > 1


def test_moving_to_the_target_lowers_the_loss() -> None:
    x, offset, label = problem()
    own = pixel_loss(location_aware_upsample(x, offset, scale_factor=(4, 3)), label).detach()
    found = location_targets(x, offset, label, own, scale=(4, 3))
    there = pixel_loss(location_aware_upsample(x, found.offset_N2HW, scale_factor=(4, 3)), label)
    assert (there[found.moved_NHW] < own[found.moved_NHW]).all()
    torch.testing.assert_close(there[~found.moved_NHW], own[~found.moved_NHW], atol=1e-12, rtol=0)


def test_zero_offsets_are_punished_as_ties() -> None:
    """Mode off, no offset: not better than plain sampling, so Lambda = 1.3 (paper) or 1 (ties forgiven)."""
    x, _, label = problem()
    zero = torch.zeros(2, 2, *label.shape[1:], dtype=F64)
    own = pixel_loss(location_aware_upsample(x, zero, scale_factor=(4, 3)), label)
    valid = label != 255
    punished = offset_guided_weight(x, label, own, scale=(4, 3))
    assert (punished[valid] == 1.3).all()
    assert (punished[~valid] == 1).all()
    assert (offset_guided_weight(x, label, own, scale=(4, 3), punish_ties=False) == 1).all()


def test_offset_guided_weight_compares_with_plain_sampling() -> None:
    x, offset, label = problem()
    own = pixel_loss(location_aware_upsample(x, offset, scale_factor=(4, 3)), label)
    plain = reference.nll(reference.upsample(x.detach(), torch.zeros_like(offset), (4, 3)), label)
    wanted = torch.where((own < plain - 1e-6) | (label == 255), 1.0, 1.5).double()
    found = offset_guided_weight(x, label, own, scale=(4, 3), lambda_=0.5)
    assert torch.equal(found, wanted)
    assert 0.1 < (found > 1).double().mean() < 0.9


def test_one_logit_is_a_sigmoid() -> None:
    """Cross entropy of (0, u) is the binary cross entropy of u, for samples and for cells."""
    x, offset, label = problem(classes=1)
    label = label.clamp(max=1).where(label != 255, 255)
    sampled = location_aware_upsample(x, offset, scale_factor=(4, 3))
    valid = label != 255
    binary = F.binary_cross_entropy_with_logits(sampled[:, 0], label.double(), reduction="none")
    torch.testing.assert_close(pixel_loss(sampled, label)[valid], binary[valid])
    assert two_sided(x).shape[1] == 2
    found = location_targets(x, offset, label, pixel_loss(sampled, label).detach(), scale=(4, 3), margin=1e-9)
    wide = torch.cat([torch.zeros_like(x), x], 1)
    literal = reference.regression_loss(
        wide,
        offset,
        location_aware_upsample(wide, offset, scale_factor=(4, 3)),
        label,
        (4, 3),
        lambda_=0.3,
        gamma=1,
    )
    torch.testing.assert_close(found.offset_N2HW, literal["target"], atol=1e-12, rtol=0)
