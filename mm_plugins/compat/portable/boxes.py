"""Overlaps of axis-aligned boxes."""

# Shapes: M and K boxes, 4 corners (x1, y1, x2, y2).
from typing import Literal

import torch
from torch import Tensor


def _area(boxes: Tensor, offset: int) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0] + offset) * (boxes[..., 3] - boxes[..., 1] + offset)


def bbox_overlaps(
    boxes_M4: Tensor,
    other_K4: Tensor,
    *,
    mode: Literal["iou", "iof"] = "iou",
    aligned: bool = False,
    offset: int = 0,
) -> Tensor:
    """Intersection over union (``iou``) or over the first box's area (``iof``).

    Args:
        boxes_M4: Boxes (x1, y1, x2, y2) in pixels, any float dtype.
        other_K4: Boxes to compare with; M of them if ``aligned``.
        mode: What to divide the intersection by.
        aligned: Compare the i-th with the i-th box instead of every pair.
        offset: Added to each width and height; 1 counts pixels, 0 measures lengths.

    Returns:
        Ratios in [0, 1], shape (M, K), or (M,) if ``aligned``; NaN for 0 / 0 (both boxes without area).
    """
    first_M14 = boxes_M4 if aligned else boxes_M4[:, None, :]
    size = torch.minimum(first_M14[..., 2:], other_K4[:, 2:]) - torch.maximum(
        first_M14[..., :2], other_K4[:, :2]
    )
    size = (size + offset).clamp(min=0)
    intersection = size[..., 0] * size[..., 1]
    area = _area(first_M14, offset)
    if mode == "iou":
        area = area + _area(other_K4, offset) - intersection
    return intersection / area
