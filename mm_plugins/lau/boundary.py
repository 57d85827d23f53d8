"""Boundary IoU: the IoU of two masks counted only near their outlines."""

# Shapes: N images, C classes, H x W pixels.
import torch
import torch.nn.functional as F
from torch import Tensor


def boundary_width(height: int, width: int, ratio: float = 0.02) -> int:
    """How many pixels deep the boundary region of an image is: a share of its diagonal, at least 1."""
    return max(1, round(ratio * (height**2 + width**2) ** 0.5))


def boundary_region(mask_NHW: Tensor, depth: int) -> Tensor:
    """Pixels of a mask that lie within `depth` pixels (chessboard distance) of its outline.

    The image's border is an outline too, as in the metric's release.

    Args:
        mask_NHW: Boolean masks.
        depth: Width of the region, >= 1.

    Returns:
        Boolean masks of the same shape.
    """
    outside = F.pad((~mask_NHW).float()[:, None], (depth, depth, depth, depth), value=1.0)
    # Separable maximum: rows, then columns.
    rows = F.max_pool2d(outside, (1, 2 * depth + 1), stride=1)
    near_outside = F.max_pool2d(rows, (2 * depth + 1, 1), stride=1)[:, 0] > 0
    return mask_NHW & near_outside


def boundary_areas(
    predicted_NHW: Tensor, label_NHW: Tensor, num_classes: int, *, depth: int, ignore_index: int = 255
) -> tuple[Tensor, Tensor]:
    """Intersection and union of the boundary regions of each class, summed over the images.

    Pixels with an ignored label are left out of both.

    Returns:
        Two tensors (C,) of pixel counts in fp64.
    """
    valid_NHW = label_NHW != ignore_index
    classes = torch.arange(num_classes, device=label_NHW.device).view(-1, 1, 1, 1)
    height, width = label_NHW.shape[1:]
    sides = []
    for index_NHW in (predicted_NHW, label_NHW):
        masks = ((index_NHW == classes) & valid_NHW).reshape(-1, height, width)
        sides.append(boundary_region(masks, depth).view(num_classes, -1))
    first, second = sides
    return (first & second).sum(1).double(), (first | second).sum(1).double()


def boundary_iou(
    predicted_NHW: Tensor,
    label_NHW: Tensor,
    num_classes: int,
    *,
    ratio: float = 0.02,
    ignore_index: int = 255,
) -> Tensor:
    """Boundary IoU of each class over a batch of maps of one size.

    Args:
        predicted_NHW: Class indices.
        label_NHW: Class indices, `ignore_index` where unlabelled.
        num_classes: Number of classes C.
        ratio: Width of the boundary region as a share of the image's diagonal.
        ignore_index: Label of pixels that do not count.

    Returns:
        IoU (C,) in [0, 1], fp64; NaN for a class that neither map holds.

    Source: Boundary IoU, Cheng et al., CVPR 2021, arXiv 2103.16562.
    """
    depth = boundary_width(label_NHW.shape[1], label_NHW.shape[2], ratio)
    intersection, union = boundary_areas(
        predicted_NHW, label_NHW, num_classes, depth=depth, ignore_index=ignore_index
    )
    return intersection / union
