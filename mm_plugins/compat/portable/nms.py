"""Non-maximum suppression: greedy, soft, and greedy with the groups it forms."""

# Shapes: N boxes, 4 corners (x1, y1, x2, y2), A and B boxes of one comparison.

import numpy as np
import torch
from torch import Tensor

BLOCK_BOXES = 256
"""Boxes whose mutual overlaps are resolved at once."""
TILE_BOXES = 512
"""Boxes compared with one block at once on a CPU, so that the temporaries stay in its cache."""


def _columns(boxes_N4: Tensor, offset: int) -> Tensor:
    """Contiguous rows x1, y1, x2, y2, area of shape (5, N), in at least fp32."""
    x1, y1, x2, y2 = boxes_N4.to(torch.promote_types(boxes_N4.dtype, torch.float32)).unbind(1)
    return torch.stack((x1, y1, x2, y2, (x2 - x1 + offset) * (y2 - y1 + offset)))


def _iou(first_5A: Tensor, other_5B: Tensor, offset: int) -> Tensor:
    """IoU of shape (A, B), -1 for 0 / 0. Operations in mmcv's order, so equal to the last bit."""
    a, b = first_5A[:, :, None], other_5B[:, None, :]
    width_AB = torch.minimum(a[2], b[2]).sub_(torch.maximum(a[0], b[0]))
    height_AB = torch.minimum(a[3], b[3]).sub_(torch.maximum(a[1], b[1]))
    if offset:
        width_AB.add_(offset)
        height_AB.add_(offset)
    intersection_AB = width_AB.clamp_(min=0).mul_(height_AB.clamp_(min=0))
    union_AB = torch.add(a[4], b[4], out=height_AB).sub_(intersection_AB)
    return intersection_AB.div_(union_AB).nan_to_num_(nan=-1.0)


def _greedy(exceeds_BB: np.ndarray) -> np.ndarray:
    """Positions that survive in order: each survivor removes the later ones that it exceeds."""
    removed_B = np.zeros(len(exceeds_BB), dtype=bool)
    for i in np.flatnonzero(np.triu(exceeds_BB, 1).any(1)):
        if not removed_B[i]:
            removed_B[i + 1 :] |= exceeds_BB[i, i + 1 :]
    return np.flatnonzero(~removed_B)


def nms(boxes_N4: Tensor, scores_N: Tensor, *, iou_threshold: float, offset: int = 0) -> Tensor:
    """Indices kept by greedy suppression, in order of falling score.

    The best box is kept and removes every box whose IoU with it is strictly greater than the threshold; then
    the best of the rest, and so on. Boxes of one score keep their order. Blocks of boxes are resolved at
    once, which changes nothing in the result.

    Args:
        boxes_N4: Boxes (x1, y1, x2, y2) in pixels; half precision is compared in fp32.
        scores_N: Scores, higher is better.
        iou_threshold: Overlap in [0, 1] above which the worse box goes.
        offset: Added to each width and height: 0 or 1.

    Returns:
        int64 indices of the kept boxes, on the device of the boxes.
    """
    order_N = scores_N.sort(dim=0, descending=True, stable=True).indices
    rest = _columns(boxes_N4.detach()[order_N], offset)
    keep = [order_N[:0]]
    tile = TILE_BOXES if boxes_N4.device.type == "cpu" else max(len(order_N), 1)
    while len(order_N):
        block = rest[:, :BLOCK_BOXES]
        overlapping = (_iou(block, block, offset) > iou_threshold).cpu().numpy()
        survivors = torch.from_numpy(_greedy(overlapping)).to(order_N.device)
        keep.append(order_N[:BLOCK_BOXES][survivors])
        block, rest, order_N = block[:, survivors].contiguous(), rest[:, BLOCK_BOXES:], order_N[BLOCK_BOXES:]
        if len(order_N):
            # The largest overlap decides; a reduction of floats is many times faster than one of booleans.
            worst = torch.cat([_iou(block, part, offset).amax(0) for part in rest.split(tile, dim=1)])
            alive = (worst <= iou_threshold).nonzero().squeeze(1)
            rest, order_N = rest.index_select(1, alive), order_N.index_select(0, alive)
    return torch.cat(keep)


def _numpy_iou(columns_5N: np.ndarray, i: int, others: slice | np.ndarray, offset: int) -> np.ndarray:
    """IoU of box i with the others, in the dtype of the columns; 0 / 0 is NaN, as in C."""
    x1, y1, x2, y2, area = columns_5N[:, others]
    a = columns_5N[:, i]
    width = np.maximum(np.minimum(a[2], x2) - np.maximum(a[0], x1) + offset, 0, dtype=x1.dtype)
    height = np.maximum(np.minimum(a[3], y2) - np.maximum(a[1], y1) + offset, 0, dtype=x1.dtype)
    intersection = width * height
    with np.errstate(divide="ignore", invalid="ignore"):
        return intersection / (a[4] + area - intersection)


def _decay(iou: np.ndarray, method: int, iou_threshold: float, sigma: float) -> np.ndarray:
    """Factor on the score of an overlapping box: 0 hard, 1 linear, 2 Gaussian."""
    if method == 2:
        # 0 / 0 (two boxes without area) counts as no overlap, as the comparisons below and in `nms` have it.
        return np.exp(-np.nan_to_num(iou * iou) / iou.dtype.type(sigma))
    hit = iou >= iou.dtype.type(iou_threshold)
    return np.where(hit, 1 - iou if method == 1 else iou.dtype.type(0), iou.dtype.type(1))


def soft_nms(
    boxes_N4: Tensor,
    scores_N: Tensor,
    *,
    iou_threshold: float,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    method: int = 1,
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Suppression that lowers the scores of overlapping boxes instead of removing them.

    The best box is taken; the scores of the others fall by ``1 - IoU`` where IoU >= threshold (linear), or by
    ``exp(-IoU^2 / sigma)`` (Gaussian); boxes below ``min_score`` go; repeat.

    Args:
        boxes_N4: Boxes (x1, y1, x2, y2) in pixels, on any device; computed on the CPU.
        scores_N: Scores.
        iou_threshold: Overlap from which the hard and linear methods act.
        sigma: Width of the Gaussian, in units of IoU^2.
        min_score: Boxes whose lowered score is below are dropped. The best box of all is never dropped.
        method: 0 hard, 1 linear, 2 Gaussian.
        offset: Added to each width and height: 0 or 1.

    Returns:
        Boxes with lowered scores of shape (K, 5), and the int64 indices of those K boxes, in the order taken.

    Source: Soft-NMS, arXiv 1704.04503. Ties follow mmcv: the earliest in its working array, in which the
    taken box changes places with the first free one and a dropped box is replaced by the last.
    """
    columns_5N = _columns(boxes_N4.detach().cpu(), offset).numpy()
    score_N = scores_N.detach().cpu().to(torch.from_numpy(columns_5N).dtype).numpy().copy()
    index_N = np.arange(len(score_N))
    i = 0
    while i < len(score_N):
        best = i + int(np.argmax(score_N[i:]))
        swap, swapped = [i, best], [best, i]
        columns_5N[:, swap], score_N[swap], index_N[swap] = (
            columns_5N[:, swapped],
            score_N[swapped],
            index_N[swapped],
        )
        i += 1
        score_N[i:] *= _decay(
            _numpy_iou(columns_5N, i - 1, slice(i, None), offset), method, iou_threshold, sigma
        )
        low = score_N[i:] < score_N.dtype.type(min_score)
        if low.any():
            order = np.concatenate((np.arange(i), i + _refill(low)))
            columns_5N, score_N, index_N = columns_5N[:, order], score_N[order], index_N[order]
    dets_K5 = np.concatenate((columns_5N[:4], score_N[None])).T
    return torch.from_numpy(np.ascontiguousarray(dets_K5)).to(boxes_N4.dtype), torch.from_numpy(index_N)


def _refill(dropped_N: np.ndarray) -> np.ndarray:
    """Order of the rest when each dropped place, from the front, takes the last one that stays."""
    num_left = int(len(dropped_N) - dropped_N.sum())
    order = np.arange(num_left)
    order[dropped_N[:num_left]] = num_left + np.flatnonzero(~dropped_N[num_left:])[::-1]
    return order


def nms_match(dets_N5: Tensor, *, iou_threshold: float) -> list[list[int]]:
    """Groups of greedy suppression: each kept box with the boxes that it removed, in order of falling score.

    Args:
        dets_N5: Boxes and scores (x1, y1, x2, y2, score).
        iou_threshold: Boxes at or above it are removed (``>=``, unlike `nms`).

    Returns:
        One list of indices a kept box, the kept one first.
    """
    dets_N5 = dets_N5.detach().cpu()
    order_N = dets_N5[:, 4].sort(dim=0, descending=True, stable=True).indices
    columns_5N = _columns(dets_N5[order_N, :4], 0).numpy()
    order = order_N.numpy()
    threshold = columns_5N.dtype.type(iou_threshold)
    groups = []
    left = np.arange(len(order))
    while len(left):
        best, left = left[0], left[1:]
        hit = _numpy_iou(columns_5N, best, left, 0) >= threshold
        groups.append(order[[best, *left[hit]]].tolist())
        left = left[~hit]
    return groups
