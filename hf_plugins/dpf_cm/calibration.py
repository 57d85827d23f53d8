"""Thresholds with a stated error: the cosine above which a prompt counts as one of the stored samples."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Calibration(NamedTuple):
    """A threshold and what it does on the calibration sets."""

    threshold: float
    false_positive_rate: float
    """Share of benign prompts above it."""
    true_positive_rate: float
    """Share of exact stored prompts above it."""
    num_benign: int
    num_stored: int


class CalibrationError(ValueError):
    """The guard cannot meet its promise; it must not start."""


def threshold_for(benign: Sequence[float], max_fpr: float, *, lowest: float = -1.0) -> float:
    """Smallest threshold t with ``share of benign cosines > t`` at most ``max_fpr``.

    With ``k = floor(max_fpr * n)`` allowed exceptions it is the (k+1)-th largest cosine: a prompt matches
    when its cosine is strictly above it. A small benign set allows no exception, so t is its maximum.

    Args:
        benign: Highest cosine of each benign prompt with any key.
        max_fpr: Allowed share in [0, 1).
        lowest: Floor of the result.

    Returns:
        The threshold.

    Raises:
        ValueError: If there is no benign prompt or the share is no share.
    """
    if not len(benign):
        raise ValueError(
            "calibration needs benign prompts; give some hundred that hold none of the private samples."
        )
    if not 0 <= max_fpr < 1:
        raise ValueError(f"max_fpr must lie in [0, 1); got {max_fpr}. Write 0.01 for 1 %.")
    ordered = sorted(benign, reverse=True)
    return max(ordered[math.floor(max_fpr * len(ordered) + 1e-9)], lowest)


def calibrate(
    benign: Sequence[float],
    exact: Sequence[float],
    *,
    max_fpr: float = 0.01,
    min_tpr: float = 0.99,
    threshold: float | None = None,
) -> Calibration:
    """Choose (or check) the threshold, and refuse if the stored prompts themselves would slip through.

    Args:
        benign: Highest cosine of each benign prompt.
        exact: Highest cosine of each stored prompt, asked exactly as stored.
        max_fpr: Allowed share of benign prompts that match.
        min_tpr: Least share of exact prompts that must match.
        threshold: A fixed threshold to judge instead (the paper's 0.8).

    Returns:
        Threshold and rates.

    Raises:
        CalibrationError: If ``min_tpr`` is missed, or a fixed threshold exceeds ``max_fpr``.
    """
    t = threshold_for(benign, max_fpr) if threshold is None else threshold
    found = Calibration(
        t,
        float(np.mean(np.asarray(benign) > t)) if len(benign) else 0.0,
        float(np.mean(np.asarray(exact) > t)) if len(exact) else 1.0,
        len(benign),
        len(exact),
    )
    if found.true_positive_rate < min_tpr:
        raise CalibrationError(
            f"the guard would let {100 * (1 - found.true_positive_rate):.1f} % of the stored "
            f"prompts through (threshold {t:.4f}, allowed {100 * (1 - min_tpr):.1f} %). Take benign prompts "
            "out that repeat stored ones, try another layer, or raise max_fpr."
        )
    if found.false_positive_rate > max_fpr:
        raise CalibrationError(
            f"a fixed threshold of {t:g} fires on {100 * found.false_positive_rate:.1f} % of benign "
            f"prompts, allowed are {100 * max_fpr:.1f} %; leave threshold unset, so that it is calibrated."
        )
    return found


def roc(positive: Sequence[float], negative: Sequence[float]) -> tuple[list[float], list[float], float]:
    """False and true positive rates at every threshold, and the area under the curve (ties count half)."""
    scores = np.concatenate([np.asarray(positive, float), np.asarray(negative, float)])
    labels = np.concatenate([np.ones(len(positive)), np.zeros(len(negative))])
    order = np.argsort(-scores, kind="stable")
    scores, labels = scores[order], labels[order]
    ends = np.append(np.nonzero(np.diff(scores))[0], len(scores) - 1)
    tpr = np.concatenate([[0.0], np.cumsum(labels)[ends] / max(1, len(positive))])
    fpr = np.concatenate([[0.0], np.cumsum(1 - labels)[ends] / max(1, len(negative))])
    area = float(((fpr[1:] - fpr[:-1]) * (tpr[1:] + tpr[:-1]) / 2).sum())
    return fpr.tolist(), tpr.tolist(), area
