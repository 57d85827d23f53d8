"""Processing-target selection: which rows need rewriting, by a small calibrated classifier.

Labels come from a teacher on a small random part; the classifier is logistic regression, its probabilities
are calibrated and its threshold chosen on rows held out from the fit. A classifier that cannot tell the two
kinds apart is not used: then every row counts as dirty.
"""

# n rows, f features.

from dataclasses import dataclass

import numpy as np

MIN_AUC = 0.65
RECALL = 0.95


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(z, -40, 40)))


def fit_logistic(x_nf: np.ndarray, y_n: np.ndarray, *, l2: float = 1.0, iterations: int = 25) -> np.ndarray:
    """Weights and bias of L2-regularised logistic regression by Newton's method; the bias is not penalised.

    Minimises ``sum log(1 + exp(-(2y - 1)(x w + b))) + l2 / 2 |w|^2``.

    Returns:
        (f + 1,) float64, the bias last.
    """
    x = np.column_stack([np.asarray(x_nf, float), np.ones(len(x_nf))])
    penalty = np.full(x.shape[1], l2)
    penalty[-1] = 1e-8
    weights = np.zeros(x.shape[1])
    for _ in range(iterations):
        p = _sigmoid(x @ weights)
        gradient = x.T @ (p - y_n) + penalty * weights
        curvature = (x.T * (p * (1 - p) + 1e-9)) @ x + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        weights -= step
        if np.abs(step).max() < 1e-8:
            break
    return weights


def roc_auc(scores: np.ndarray, y_n: np.ndarray) -> float:
    """Probability that a dirty row scores above a clean one, ties counted half; 0.5 if one kind is absent."""
    order = np.argsort(scores, kind="stable")
    ranks = np.empty(len(scores))
    sorted_scores = np.asarray(scores, float)[order]
    start = 0
    while start < len(order):
        stop = np.searchsorted(sorted_scores, sorted_scores[start], side="right")
        ranks[order[start:stop]] = (start + stop - 1) / 2 + 1
        start = stop
    positive = y_n == 1
    p, n = int(positive.sum()), int((~positive).sum())
    return float((ranks[positive].sum() - p * (p + 1) / 2) / (p * n)) if p and n else 0.5


def precision_recall(scores: np.ndarray, y_n: np.ndarray) -> list[tuple[float, float, float]]:
    """(threshold, precision, recall) at each distinct score, descending."""
    found = []
    for threshold in np.unique(scores)[::-1]:
        flagged = scores >= threshold
        hits = int((flagged & (y_n == 1)).sum())
        found.append((float(threshold), hits / int(flagged.sum()), hits / max(int((y_n == 1).sum()), 1)))
    return found


def threshold_for_recall(scores: np.ndarray, y_n: np.ndarray, recall: float = RECALL) -> float:
    """The largest threshold at which ``score >= threshold`` finds this share of the dirty rows.

    Raises:
        ValueError: If there is no dirty row to find.
    """
    dirty = np.sort(scores[y_n == 1])[::-1]
    if len(dirty) == 0:
        raise ValueError("a threshold for recall needs at least one row labelled dirty; got none.")
    return float(dirty[int(np.ceil(recall * len(dirty) - 1e-9)) - 1])


@dataclass(frozen=True)
class Screener:
    """A fitted classifier of rows that need rewriting."""

    weights: np.ndarray
    """(f + 1,) on standardised features."""
    mean: np.ndarray
    scale: np.ndarray
    platt: tuple[float, float]
    """Slope and offset that turn margins into probabilities."""
    threshold: float
    """Probability from which a row is dirty."""
    auc: float
    """On the held-out labels."""
    curve: tuple[tuple[float, float, float], ...] = ()
    """Precision and recall on the held-out labels."""

    @property
    def usable(self) -> bool:
        """Whether it tells dirty from clean rows; otherwise all rows are processed."""
        return self.auc >= MIN_AUC

    def probability(self, x_nf: np.ndarray) -> np.ndarray:
        """Calibrated probability that a row is dirty, (n,)."""
        z = (np.asarray(x_nf, float) - self.mean) / self.scale
        return _sigmoid(self.platt[0] * (z @ self.weights[:-1] + self.weights[-1]) + self.platt[1])

    def dirty(self, x_nf: np.ndarray) -> np.ndarray:
        """(n,) bool: rows to process; all of them if the classifier is not usable."""
        if not self.usable:
            return np.ones(len(x_nf), bool)
        return self.probability(x_nf) >= self.threshold


def fit_screener(
    x_nf: np.ndarray, y_n: np.ndarray, *, seed: int = 0, held_out: float = 0.2, recall: float = RECALL
) -> Screener:
    """Fit on most labelled rows; calibrate, choose the threshold and measure on the rest.

    Args:
        x_nf: (n, f) features of the labelled rows.
        y_n: (n,) 1 for rows that need rewriting, 0 for others.
        seed: Of the split, which keeps the share of both kinds.
        held_out: Share of rows that the fit does not see.
        recall: Share of dirty rows the threshold must find.

    Returns:
        The classifier; not usable where a kind is too rare to be split.

    Raises:
        ValueError: If rows and labels do not pair or labels are other than 0 and 1.
    """
    y = np.asarray(y_n)
    if len(x_nf) != len(y) or not np.isin(y, (0, 1)).all():
        raise ValueError(
            f"screening needs one label 0 or 1 a row; got {len(x_nf)} rows, labels {np.unique(y)[:5]}."
        )
    x = np.asarray(x_nf, float)
    mean, scale = x.mean(0), x.std(0)
    scale[scale == 0] = 1
    generator = np.random.default_rng(seed)
    aside = np.zeros(len(y), bool)
    for kind in (0, 1):
        members = generator.permutation(np.flatnonzero(y == kind))
        aside[members[: int(np.ceil(held_out * len(members)))]] = True
    if min((y[aside] == kind).sum() for kind in (0, 1)) < 2 or len(np.unique(y[~aside])) < 2:
        return Screener(np.zeros(x.shape[1] + 1), mean, scale, (1.0, 0.0), 0.0, 0.5)
    z = (x - mean) / scale
    weights = fit_logistic(z[~aside], y[~aside])
    margin = z[aside] @ weights[:-1] + weights[-1]
    slope, offset = fit_logistic(margin[:, None], _platt_targets(y[aside]), l2=1e-3)
    probability = _sigmoid(slope * margin + offset)
    return Screener(
        weights,
        mean,
        scale,
        (float(slope), float(offset)),
        threshold_for_recall(probability, y[aside], recall),
        roc_auc(probability, y[aside]),
        tuple(precision_recall(probability, y[aside])),
    )


def _platt_targets(y_n: np.ndarray) -> np.ndarray:
    """Platt's targets: one invented row of each kind, so that few labels do not give probabilities 0 and
    1.
    """
    p, n = int((y_n == 1).sum()), int((y_n == 0).sum())
    return np.where(y_n == 1, (p + 1) / (p + 2), 1 / (n + 2))
