"""Panoptic quality from two maps of segment ids, without files and without a loop over pairs of segments."""

# Shapes: H x W pixels, G annotated segments, P predicted segments, C classes, K pairs that share a pixel,
# M matches.
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from mm_plugins.spatialflow.segment_ids import VOID


class Pairs(NamedTuple):
    """How many pixels two maps share, id by id."""

    first_K: np.ndarray
    """Id in the first map, ascending."""
    second_K: np.ndarray
    """Id in the second map, ascending within one id of the first."""
    pixels_K: np.ndarray
    """Pixels that carry both, int64."""


def count_pairs(first_HW: np.ndarray, second_HW: np.ndarray) -> Pairs:
    """Count the pixels of every pair of ids that occurs.

    Panoptic maps are constant along runs of pixels, so runs are sorted instead of pixels.

    Args:
        first_HW: Integers in [0, 2**31).
        second_HW: Integers in [0, 2**31), same shape.

    Returns:
        The pairs that occur, sorted.

    Raises:
        ValueError: If the shapes differ.
    """
    if first_HW.shape != second_HW.shape:
        raise ValueError(
            f"both maps must have one size; got {first_HW.shape} annotated and {second_HW.shape} predicted. "
            "Predict with rescale=True, so that the prediction has the size of the original image."
        )
    first, second = first_HW.ravel().astype(np.int64), second_HW.ravel().astype(np.int64)
    if not first.size:
        none = np.empty(0, np.int64)
        return Pairs(none, none, none)
    change = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    starts = np.concatenate([[0], np.flatnonzero(change) + 1])
    lengths = np.diff(starts, append=first.size)
    base = int(second.max()) + 1
    keys, inverse = np.unique(first[starts] * base + second[starts], return_inverse=True)
    # Sums of whole numbers below 2**53 are exact in float64.
    pixels = np.bincount(inverse, weights=lengths, minlength=len(keys)).astype(np.int64)
    return Pairs(keys // base, keys % base, pixels)


class ImageCounts(NamedTuple):
    """What one image adds to panoptic quality."""

    matched_M: np.ndarray
    """Class of every match (true positive), in the order of the annotated ids."""
    iou_M: np.ndarray
    """Its intersection over union, float64 in (0.5, 1]."""
    false_positive: np.ndarray
    """Class of every predicted segment that is wrong."""
    false_negative: np.ndarray
    """Class of every annotated segment that was missed."""


def count_image(
    gt_HW: np.ndarray,
    gt_ids: Sequence[int],
    gt_labels: Sequence[int],
    gt_crowd: Sequence[bool],
    pred_HW: np.ndarray,
    pred_ids: Sequence[int],
    pred_labels: Sequence[int],
) -> ImageCounts:
    """Match predicted to annotated segments: same class and IoU > 1/2, which can hold for one pair only.

    Void pixels of the annotation count neither for nor against a prediction. A predicted segment that is
    mostly void, or mostly the crowd region of its class, is no false positive.

    Args:
        gt_HW: Annotated ids; `VOID` is void, and so is every id that is not in `gt_ids`.
        gt_ids: Ids of the annotated segments (G), in the order of the annotation.
        gt_labels: Their classes.
        gt_crowd: Whether they are crowd regions, which are never matched.
        pred_HW: Predicted ids of the same size; an id that is not in `pred_ids` is void.
        pred_ids: Ids of the predicted segments (P).
        pred_labels: Their classes.

    Returns:
        Matches and errors of this image.

    Source: Kirillov et al., Panoptic Segmentation, CVPR 2019; rules for void and crowd as in panopticapi,
    where of several crowd regions of one class the last listed counts.
    """
    pairs = count_pairs(gt_HW, pred_HW)
    gt_index, gt_classes, crowd = _positions(gt_ids), np.asarray(gt_labels, int), np.asarray(gt_crowd, bool)
    pred_index, pred_classes = _positions(pred_ids), np.asarray(pred_labels, int)
    g_K, p_K = gt_index(pairs.first_K), pred_index(pairs.second_K)
    gt_area = _sum_by(g_K, pairs.pixels_K, len(gt_classes))
    pred_area = _sum_by(p_K, pairs.pixels_K, len(pred_classes))
    # Pixels of each prediction that are void in the annotation.
    void = _sum_by(np.where(pairs.first_K == VOID, p_K, -1), pairs.pixels_K, len(pred_classes))

    both = (g_K >= 0) & (p_K >= 0)
    g, p, inter = g_K[both], p_K[both], pairs.pixels_K[both]
    iou = inter / np.maximum(pred_area[p] + gt_area[g] - inter - void[p], 1)
    hit = (gt_classes[g] == pred_classes[p]) & ~crowd[g] & (iou > 0.5)

    missed = ~crowd
    missed[g[hit]] = False
    ignored = void.copy()
    for label, region in {int(gt_classes[i]): i for i in np.flatnonzero(crowd)}.items():
        covered = (g == region) & (pred_classes[p] == label)
        ignored[p[covered]] += inter[covered]
    wrong = ignored / np.maximum(pred_area, 1) <= 0.5
    wrong[p[hit]] = False
    return ImageCounts(gt_classes[g[hit]], iou[hit], pred_classes[wrong], gt_classes[missed])


class Quality(NamedTuple):
    """Panoptic quality, its two factors, and the counts behind them, of every class."""

    pq_C: np.ndarray
    """``sum of IoU / (TP + FP/2 + FN/2)``; NaN for a class that neither occurs nor is predicted."""
    sq_C: np.ndarray
    """Mean IoU of the matches; 0 without a match."""
    rq_C: np.ndarray
    """``TP / (TP + FP/2 + FN/2)``, the F1 of segments."""
    tp_C: np.ndarray
    fp_C: np.ndarray
    fn_C: np.ndarray


def panoptic_quality(images: Iterable[ImageCounts], num_classes: int) -> Quality:
    """Panoptic quality of each class over a data set: ``PQ = SQ * RQ``, all in [0, 1].

    Args:
        images: Counts of the images; sums run in their order.
        num_classes: C.

    Returns:
        One entry a class.

    Source: Kirillov et al., CVPR 2019, Eq. (1).
    """
    iou_C = np.zeros(num_classes)
    tp_C, fp_C, fn_C = (np.zeros(num_classes, np.int64) for _ in range(3))
    for image in images:
        # One match after the other, as panopticapi adds them: equal to its numbers to the last digit.
        np.add.at(iou_C, image.matched_M, image.iou_M)
        np.add.at(tp_C, image.matched_M, 1)
        np.add.at(fp_C, image.false_positive, 1)
        np.add.at(fn_C, image.false_negative, 1)
    with np.errstate(invalid="ignore"):
        size_C = tp_C + 0.5 * fp_C + 0.5 * fn_C
        sq_C = np.where(tp_C > 0, iou_C / np.maximum(tp_C, 1), np.where(size_C > 0, 0.0, np.nan))
        return Quality(iou_C / size_C, sq_C, tp_C / size_C, tp_C, fp_C, fn_C)


def mean_of_seen(values_C: np.ndarray, chosen: Sequence[int] | None = None) -> tuple[float, int]:
    """Mean over the classes that occur, one after the other.

    Args:
        values_C: One value a class, NaN where the class does not occur.
        chosen: Classes to average, in order; all by default.

    Returns:
        The mean, NaN if none of them occurs, and the number of classes in it.
    """
    seen = [v for v in (values_C if chosen is None else values_C[list(chosen)]).tolist() if not math.isnan(v)]
    return (sum(seen) / len(seen) if seen else math.nan), len(seen)


def _sum_by(index_K: np.ndarray, value_K: np.ndarray, size: int) -> np.ndarray:
    known = index_K >= 0
    return np.bincount(index_K[known], weights=value_K[known], minlength=size).astype(np.int64)


class _positions:
    """Where an id stands in a list; -1 for one that is not in it."""

    def __init__(self, ids: Sequence[int]) -> None:
        ids_S = np.asarray(ids, np.int64)
        self.order = np.argsort(ids_S, kind="stable")
        self.sorted = ids_S[self.order]

    def __call__(self, wanted_K: np.ndarray) -> np.ndarray:
        if not len(self.sorted):
            return np.full(len(wanted_K), -1)
        place = np.searchsorted(self.sorted, wanted_K).clip(max=len(self.sorted) - 1)
        return np.where(self.sorted[place] == wanted_K, self.order[place], -1)
