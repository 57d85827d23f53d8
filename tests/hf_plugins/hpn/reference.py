"""Slow literal forms of what the room computes: loops over examples, float64, no tricks."""

import math
from collections.abc import Sequence

import numpy as np


def fourier(x: Sequence[float], frequencies: np.ndarray) -> list[float]:
    """phi(x) of one input."""
    phases = [sum(w * v for w, v in zip(row, x, strict=True)) for row in frequencies]
    scale = math.sqrt(len(frequencies))
    return [math.cos(p) / scale for p in phases] + [math.sin(p) / scale for p in phases]


def mean_embedding(
    xs: Sequence[Sequence[float]], labels: Sequence[int], frequencies: np.ndarray, num_labels: int
) -> np.ndarray:
    """M_k, example by example."""
    out = np.zeros((2 * len(frequencies), num_labels))
    for x, label in zip(xs, labels, strict=True):
        for row, value in enumerate(fourier(x, frequencies)):
            out[row, label] += value / len(xs)
    return out


def gaussian_delta(noise_multiplier: float, epsilon: float) -> float:
    """Delta of the Gaussian mechanism by integrating max(0, p - e^eps q) over a fine grid."""
    grid = np.linspace(-40 * noise_multiplier, 40 * noise_multiplier + 1, 2_000_001)
    p = np.exp(-(((grid - 1) / noise_multiplier) ** 2) / 2)
    q = np.exp(-((grid / noise_multiplier) ** 2) / 2)
    excess = np.maximum(0, p - math.exp(epsilon) * q)
    return float(excess.sum() * (grid[1] - grid[0]) / (noise_multiplier * math.sqrt(2 * math.pi)))


def ridge(features: np.ndarray, clients: np.ndarray, gains: np.ndarray, penalty: float) -> np.ndarray:
    """Weights of ridge regression on the outer products, trial by trial, no grouping."""
    design = np.stack([np.outer(f, c).ravel() for f, c in zip(features, clients, strict=True)])
    return np.linalg.solve(design.T @ design + penalty * np.eye(design.shape[1]), design.T @ gains)
