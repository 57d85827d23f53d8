"""Boundary IoU: the region by loops, and values by hand."""

import pytest
import torch

from mm_plugins.lau import boundary_iou
from mm_plugins.lau.boundary import boundary_region, boundary_width
from tests.mm_plugins.lau import reference


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_region_agrees_with_the_loops(depth: int) -> None:
    mask = torch.rand(3, 9, 11, generator=torch.Generator().manual_seed(depth)) > 0.15
    wanted = torch.tensor([reference.boundary_region(m.tolist(), depth) for m in mask])
    assert torch.equal(boundary_region(mask, depth), wanted)


def test_width_is_a_share_of_the_diagonal() -> None:
    assert boundary_width(300, 400) == 10
    assert boundary_width(4, 4) == 1


def test_shifted_square_by_hand() -> None:
    """10x10, depth 1 (2 % of 14): a 6x6 square's ring has 36-16 = 20 pixels; shifted right by one.

    The rings share their top and bottom rows (5 + 5); their sides are in columns 2, 7 and 3, 8 and never meet
    but in those rows: intersection 10, union 30.
    """
    label, predicted = torch.zeros(1, 10, 10, dtype=torch.long), torch.zeros(1, 10, 10, dtype=torch.long)
    label[0, 2:8, 2:8] = 1
    predicted[0, 2:8, 3:9] = 1
    assert boundary_iou(predicted, label, 2)[1].item() == pytest.approx(10 / 30)
    assert boundary_iou(label, label, 2).tolist() == [1, 1]


def test_ignored_pixels_and_absent_classes() -> None:
    label = torch.zeros(1, 6, 6, dtype=torch.long)
    label[0, :, 3:] = 255
    predicted = torch.zeros_like(label)
    predicted[0, :, 3:] = 1
    found = boundary_iou(predicted, label, 3)
    assert found[0] == 1
    assert found[1:].isnan().all()
