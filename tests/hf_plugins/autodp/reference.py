"""The slow, literal formulas: loops, float64, whole matrices."""

import itertools
import math

import numpy as np


def every_strategy(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [order for length in range(1, len(names) + 1) for order in itertools.permutations(names, length)]


def centrality(x: np.ndarray, m: int) -> list[int]:
    """Top m by the row sums of the whole similarity matrix."""
    sums = (x @ x.T).sum(1)
    return sorted(range(len(x)), key=lambda i: (-sums[i], i))[:m]


def graph_cut(x: np.ndarray, m: int, lam: float) -> list[int]:
    similarity = x @ x.T
    chosen: list[int] = []
    for _ in range(m):
        gains = {
            i: similarity[i].sum() - 2 * lam * sum(similarity[i, j] for j in chosen)
            for i in range(len(x))
            if i not in chosen
        }
        chosen.append(max(gains, key=gains.__getitem__))
    return chosen


def herding(x: np.ndarray, m: int, width: float) -> list[int]:
    kernel = np.array([[math.exp(-((a - b) ** 2).sum() / (2 * width**2)) for b in x] for a in x])
    chosen: list[int] = []
    for step in range(m):
        gains = {
            i: kernel[i].mean() - sum(kernel[i, j] for j in chosen) / (step + 1)
            for i in range(len(x))
            if i not in chosen
        }
        chosen.append(max(gains, key=gains.__getitem__))
    return chosen


def score(first: list[str], second: list[str]) -> float:
    """(wins - losses) / (2 |Q|), wins and losses of the candidate counted over both orders."""
    wins = first.count("win") + second.count("lose")
    losses = first.count("lose") + second.count("win")
    return (wins - losses) / (2 * len(first))


def kendall_tau(x: list[float], y: list[float]) -> float:
    same = opposite = ties_x = ties_y = 0
    for i, j in itertools.combinations(range(len(x)), 2):
        a, b = np.sign(x[i] - x[j]), np.sign(y[i] - y[j])
        same += a * b > 0
        opposite += a * b < 0
        ties_x += a == 0
        ties_y += b == 0
    pairs = len(x) * (len(x) - 1) / 2
    return (same - opposite) / math.sqrt((pairs - ties_x) * (pairs - ties_y))


def auc(scores: list[float], labels: list[int]) -> float:
    pairs = [
        (s, t)
        for s, a in zip(scores, labels, strict=True)
        if a
        for t, b in zip(scores, labels, strict=True)
        if not b
    ]
    return sum((s > t) + (s == t) / 2 for s, t in pairs) / len(pairs)


def less(training: list[np.ndarray], validation: list[np.ndarray], rates: list[float]) -> np.ndarray:
    """Cosines by loops, weighted by the checkpoints' rates."""
    total = np.zeros(len(training[0]))
    for train, val, rate in zip(training, validation, rates, strict=True):
        for i, g in enumerate(train):
            cosines = [g @ h / (np.linalg.norm(g) * np.linalg.norm(h)) for h in val]
            total[i] += rate / sum(rates) * np.mean(cosines)
    return total
