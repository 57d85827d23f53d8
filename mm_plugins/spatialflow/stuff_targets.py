"""Targets of the stuff sub-network and the number of pixels that its loss is divided by."""

# Shapes: N images, H x W pixels of the padded batch.
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

IGNORED = 255
"""Label of pixels that do not count."""


def stuff_labels(label_NHW: Tensor, num_things: int, num_stuff: int) -> Tensor:
    """Class indices of the stuff head: stuff classes first, then one channel for all things.

    Args:
        label_NHW: Things in [0, num_things), then stuff; anything beyond is ignored.
        num_things: Number of thing classes.
        num_stuff: Number of stuff classes.

    Returns:
        int64 of the same shape: stuff in [0, num_stuff), things num_stuff, else 255.
    """
    label_NHW = label_NHW.long()
    stuff_NHW = label_NHW - num_things
    target = torch.where(stuff_NHW < 0, num_stuff, stuff_NHW)
    known = (label_NHW >= 0) & (label_NHW < num_things + num_stuff)
    return torch.where(known, target, IGNORED)


def loss_area(
    target_NHW: Tensor,
    sizes: Sequence[tuple[int, int]],
    *,
    mode: Literal["valid", "official"] = "valid",
) -> tuple[Tensor, int]:
    """Targets with what lies outside of the images ignored, and the divisor of the summed cross entropy.

    ``valid``: every image has its own area, and the loss is a mean over the pixels of all images (ignored
    pixels inside of an image count in the divisor, as in the release). ``official`` repeats the release bug
    by bug: the area of the *first* image holds for all, padding inside of that area is trained as stuff class
    0, and the sum over N images is divided by one area, so that the loss is N times as large.

    Args:
        target_NHW: Labels of the padded batch.
        sizes: Height and width of each image before padding, in pixels of `target_NHW`.
        mode: See above.

    Returns:
        Targets (a copy) and the divisor, >= 1.
    """
    target_NHW = target_NHW.clone()
    if mode == "official":
        rows, columns = sizes[0]
        for target, (height, width) in zip(target_NHW, sizes, strict=True):
            target[height:] = 0
            target[:, width:] = 0
            target[rows:] = IGNORED
            target[:, columns:] = IGNORED
        return target_NHW, max(rows * columns, 1)
    for target, (height, width) in zip(target_NHW, sizes, strict=True):
        target[height:] = IGNORED
        target[:, width:] = IGNORED
    return target_NHW, max(sum(height * width for height, width in sizes), 1)
