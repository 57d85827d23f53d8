"""Overlaps of boxes."""

import numpy as np
import pytest
import torch

import mm_plugins  # noqa: F401
from mm_plugins.compat.portable.boxes import bbox_overlaps
from tests.mm_plugins.compat import reference

FIRST = torch.tensor([[0.0, 0, 10, 10], [10, 10, 20, 20]])
OTHER = torch.tensor([[0.0, 0, 10, 20], [0, 10, 10, 19], [10, 10, 20, 20]])


def test_by_hand() -> None:
    """10x10 inside 10x20: 100 / 200; touching edges share no area; equal boxes: 1."""
    expected = torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert torch.equal(bbox_overlaps(FIRST, OTHER), expected)
    # Over the first box: 100 / 100 where the second covers it.
    assert torch.equal(bbox_overlaps(FIRST, OTHER, mode="iof")[0], torch.tensor([1.0, 0.0, 0.0]))


def test_offset_counts_pixels() -> None:
    """With offset 1, boxes [0, 10] and [10, 20] share one pixel a side: 1 / (121 + 121 - 1)."""
    got = bbox_overlaps(FIRST[:1], FIRST[1:], offset=1)
    torch.testing.assert_close(got, torch.tensor([[1 / 241]]))


def test_aligned_is_the_diagonal() -> None:
    full = bbox_overlaps(FIRST, OTHER[1:])
    assert torch.equal(bbox_overlaps(FIRST, OTHER[1:], aligned=True), full.diagonal())


@pytest.mark.parametrize("mode", ["iou", "iof"])
@pytest.mark.parametrize("offset", [0, 1])
def test_equals_reference_through_mmcv(mode: str, offset: int) -> None:
    from mmcv.ops import bbox_overlaps as through_mmcv

    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(2, 6, 4, generator=generator, dtype=torch.float64) * 20
    boxes[..., 2:] += boxes[..., :2]
    got = through_mmcv(boxes[0], boxes[1], mode, False, offset)
    expected = [[reference.iou(a, b, offset, mode) for b in boxes[1].numpy()] for a in boxes[0].numpy()]
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_no_boxes() -> None:
    assert bbox_overlaps(FIRST[:0], OTHER).shape == (0, 3)
    assert bbox_overlaps(FIRST, OTHER[:0]).shape == (2, 0)
