"""Slow literal forms: panoptic quality by masks and pairs, greedy fusion on whole maps, the release's
broadcast stuff loss; and random panoptic images."""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class PanopticImage(NamedTuple):
    """One annotated and one predicted map."""

    gt: np.ndarray
    segments: list[dict[str, Any]]
    panoptic: np.ndarray
    """mmdet's encoding: label + 1000 * instance, void = num_classes."""


def random_image(
    rng: np.random.Generator, num_things: int = 4, num_stuff: int = 3, size: tuple[int, int] = (40, 56)
) -> PanopticImage:
    """Rectangles as segments, some of them crowd; the prediction is the annotation moved and partly wrong."""
    height, width = size
    num_classes = num_things + num_stuff
    gt = np.zeros(size, np.int64)
    panoptic = np.full(size, num_classes, np.int64)
    ids = rng.choice(2**24 - 1, size=12, replace=False) + 1
    segments: dict[int, dict[str, Any]] = {}
    for key in ids.tolist():
        top, left = int(rng.integers(height)), int(rng.integers(width))
        rows, columns = int(rng.integers(4, 24)), int(rng.integers(4, 24))
        label = int(rng.integers(num_classes))
        if label >= num_things and any(s["category_id"] == label for s in segments.values()):
            continue
        gt[top : top + rows, left : left + columns] = key
        crowd = int(label < num_things and rng.random() < 0.2)
        segments[key] = {"id": key, "category_id": label, "iscrowd": crowd}
        if rng.random() < 0.25:
            continue
        dy, dx = rng.integers(-2, 3, size=2)
        top, left = max(top + int(dy), 0), max(left + int(dx), 0)
        seen = label if rng.random() < 0.85 else int(rng.integers(num_classes))
        value = seen + (1000 * (len(segments) + 1) if seen < num_things else 0)
        panoptic[top : top + rows, left : left + columns] = value
    listed = [segment for key, segment in segments.items() if (gt == key).any()]
    for segment in listed:
        segment["area"] = int((gt == segment["id"]).sum())
    return PanopticImage(gt, listed, panoptic)


def random_images(seed: int, num_images: int = 3) -> list[PanopticImage]:
    """One case of the parity record."""
    rng = np.random.default_rng(seed)
    return [random_image(rng) for _ in range(num_images)]


def quality_by_pairs(images: list[PanopticImage], num_classes: int) -> list[tuple[float, float, float]]:
    """PQ, SQ, RQ of each class, by the definition: every pair of masks is intersected."""
    iou_sum = [0.0] * num_classes
    tp, fp, fn = ([0] * num_classes for _ in range(3))
    for gt, segments, panoptic in images:
        void = ~np.isin(gt, [s["id"] for s in segments])
        predicted = {int(v): panoptic == v for v in np.unique(panoptic) if v % 1000 < num_classes}
        crowd = {s["category_id"]: gt == s["id"] for s in segments if s["iscrowd"]}
        taken = set()
        for segment in segments:
            if segment["iscrowd"]:
                continue
            mask, label = gt == segment["id"], segment["category_id"]
            found = False
            for value, pred in predicted.items():
                inter = int((mask & pred).sum())
                union = int(((mask | pred) & ~(void & ~mask)).sum())
                if value % 1000 == label and inter / union > 0.5:
                    iou_sum[label] += inter / union
                    tp[label] += 1
                    taken.add(value)
                    found = True
            fn[label] += not found
        for value, pred in predicted.items():
            label = value % 1000
            if value in taken:
                continue
            excused = pred & (void | crowd.get(label, np.zeros_like(void)))
            fp[label] += not excused.sum() / pred.sum() > 0.5
    rows = []
    for c in range(num_classes):
        size = tp[c] + 0.5 * fp[c] + 0.5 * fn[c]
        rows.append(
            (iou_sum[c] / size, iou_sum[c] / tp[c] if tp[c] else 0.0, tp[c] / size)
            if size
            else (float("nan"),) * 3
        )
    return rows


def greedy_fusion(
    masks: np.ndarray,
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    stuff: np.ndarray,
    *,
    num_things: int,
    num_stuff: int,
    score_thr: float,
    mask_overlap: float,
    stuff_area_limit: int,
    box_fill: float | None,
) -> np.ndarray:
    """Fusion as the release words it, on whole maps."""
    height, width = stuff.shape
    void = num_things + num_stuff
    out = np.full((height, width), void, np.int64)
    used = np.zeros((height, width), bool)
    ids: dict[int, int] = {}
    order = [n for n in np.argsort(-scores, kind="stable").tolist() if scores[n] >= score_thr]
    for n in order:
        area = masks[n].sum()
        if area == 0 or (masks[n] & used).sum() / area > mask_overlap:
            continue
        ids[n] = int(labels[n]) + 1000 * (len(ids) + 1)
        out[masks[n] & ~used] = ids[n]
        used |= masks[n]
    for j in range(num_stuff):
        left = (stuff == j) & (out == void)
        if left.sum() >= stuff_area_limit:
            out[left] = num_things + j
    for n in order if box_fill is not None else []:
        box = np.zeros((height, width), bool)
        x1, y1, x2, y2 = (max(int(v), 0) for v in boxes[n])
        box[y1:y2, x1:x2] = True
        left = box & (out == void)
        if box.sum() == 0 or left.sum() / box.sum() < box_fill:
            continue
        if n not in ids:
            ids[n] = int(labels[n]) + 1000 * (len(ids) + 1)
        out[left] = ids[n]
    return out


def official_stuff_loss(logits: Tensor, labels: Tensor, first_size: tuple[int, int], weight: float) -> Tensor:
    """The release's stuff loss with its broadcast: (N, H, W) times (N, 1, H, W) is (N, N, H, W)."""
    each = F.cross_entropy(logits, labels, ignore_index=255, reduction="none")
    valid = torch.zeros(labels.shape[0], 1, *labels.shape[1:])
    valid[..., : first_size[0], : first_size[1]] = 1
    return weight * (each * valid).sum() / valid.sum()
