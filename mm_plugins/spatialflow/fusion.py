"""Thing masks, stuff and boxes laid into one panoptic map."""

# Shapes: N instances, H x W pixels.
import math

import torch
from torch import Tensor

from mm_plugins.spatialflow.segment_ids import INSTANCE_OFFSET


def fuse(
    masks_NHW: Tensor,
    boxes_N4: Tensor,
    scores_N: Tensor,
    labels_N: Tensor,
    stuff_HW: Tensor,
    *,
    num_things: int,
    num_stuff: int,
    score_thr: float = 0.37,
    mask_overlap: float = 0.37,
    stuff_area_limit: int = 4900,
    box_fill: float | None = 0.5,
    cropped: bool = True,
) -> Tensor:
    """Greedy fusion by score, then stuff, then "box fill".

    1. Instances with score >= `score_thr`, best first: skipped if empty, or if more than `mask_overlap` of it
       is already taken; otherwise it gets what is left of its mask.
    2. Stuff classes on free pixels, those of at least `stuff_area_limit` pixels.
    3. For every kept *box*, also of a skipped mask: if the free share of the box is at least `box_fill`, the
       free pixels become that instance.

    Args:
        masks_NHW: Instance masks, bool. With `cropped`, a mask has no pixel further than one outside its box,
            as mmdet pastes masks.
        boxes_N4: x1, y1, x2, y2 in pixels of the map.
        scores_N: Scores of the instances; of equal ones the first listed goes first.
        labels_N: Classes, in [0, num_things).
        stuff_HW: Stuff class in [0, num_stuff), or num_stuff for "some thing", which stays free.
        num_things: Number of thing classes.
        num_stuff: Number of stuff classes.
        score_thr: Least score.
        mask_overlap: Largest share of a mask that may be taken already.
        stuff_area_limit: Least number of free pixels of a stuff class.
        box_fill: Least free share of a box, or None for no third step.
        cropped: Work inside of each box instead of on the whole map; same result.

    Returns:
        Map (H, W), int32: ``label + 1000 * k`` with k = 1, 2, ... for things, ``num_things + j`` for stuff,
        ``num_things + num_stuff`` for void.

    Source: SpatialFlow's release (``combine_panoptic``) with its constants for COCO; steps 1 and 2 as
    Kirillov et al., CVPR 2019.
    """
    height, width = stuff_HW.shape
    void = num_things + num_stuff
    panoptic = torch.full((height, width), void, dtype=torch.int32, device=stuff_HW.device)
    order = torch.argsort(scores_N, descending=True, stable=True)
    kept = order[scores_N[order] >= score_thr].tolist()
    boxes, labels = boxes_N4.tolist(), labels_N.tolist()

    free = torch.ones((height, width), dtype=torch.bool, device=stuff_HW.device)
    ids: dict[int, int] = {}
    for n in kept:
        window = _around(boxes[n], height, width) if cropped else (slice(None), slice(None))
        mask, free_here = masks_NHW[n][window], free[window]
        area = int(mask.sum())
        if area == 0:
            continue
        part = mask & free_here
        if (area - int(part.sum())) / area > mask_overlap:
            continue
        ids[n] = labels[n] + INSTANCE_OFFSET * (len(ids) + 1)
        panoptic[window][part] = ids[n]
        free_here[part] = False

    # Free pixels of "some thing" have index num_stuff: laid or not, they are void.
    areas = torch.bincount(stuff_HW[free], minlength=num_stuff + 1)
    large = areas >= stuff_area_limit
    laid = free & large[stuff_HW]
    panoptic[laid] = (stuff_HW[laid] + num_things).to(panoptic.dtype)

    if box_fill is None:
        return panoptic
    for n in kept:
        inside = panoptic[_inside(boxes[n], height, width)]
        if inside.numel() == 0:
            continue
        left = inside == void
        if int(left.sum()) / inside.numel() < box_fill:
            continue
        if n not in ids:
            ids[n] = labels[n] + INSTANCE_OFFSET * (len(ids) + 1)
        inside[left] = ids[n]
    return panoptic


def _around(box: list[float], height: int, width: int) -> tuple[slice, slice]:
    """Window of the box and one pixel more on every side: all that a pasted mask can reach."""
    x1, y1, x2, y2 = box
    rows = slice(max(math.floor(y1) - 1, 0), max(min(math.ceil(y2) + 1, height), 0))
    return rows, slice(max(math.floor(x1) - 1, 0), max(min(math.ceil(x2) + 1, width), 0))


def _inside(box: list[float], height: int, width: int) -> tuple[slice, slice]:
    """Window of the box with its coordinates cut to whole numbers, as the release does."""
    x1, y1, x2, y2 = (int(value) for value in box)
    rows = slice(max(y1, 0), max(min(y2, height), 0))
    return rows, slice(max(x1, 0), max(min(x2, width), 0))
