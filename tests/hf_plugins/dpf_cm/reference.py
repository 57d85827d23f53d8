"""Slow, literal formulas: the table of the longest common subsequence, the pooling loop, the exact scan."""

from collections.abc import Sequence

import numpy as np


def lcs_table(a: Sequence[object], b: Sequence[object]) -> int:
    """Longest common subsequence by the textbook table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def prefix_mean(hidden: np.ndarray, mask: Sequence[int], end: int) -> np.ndarray:
    """Mean of the unmasked rows before ``end``, in float64."""
    rows = [hidden[t].astype(np.float64) for t in range(end) if mask[t]]
    return np.mean(rows, axis=0) if rows else np.zeros(hidden.shape[1])


def whiten(states: np.ndarray, fit: np.ndarray, count: int) -> np.ndarray:
    """Centre, remove the leading eigenvectors of the covariance, scale to length one, in float64."""
    mean = fit.mean(0)
    _, vectors = np.linalg.eigh(np.cov((fit - mean).T))
    x = states - mean
    for k in range(1, count + 1):
        v = vectors[:, -k]
        x = x - np.outer(x @ v, v)
    return x / np.linalg.norm(x, axis=1, keepdims=True)
