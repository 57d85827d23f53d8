"""The slow literal formulas: one list of numbers, loops, no tricks."""

import math
from collections.abc import Sequence


def norm(vector: Sequence[float]) -> float:
    return math.sqrt(math.fsum(x * x for x in vector))


def clip(vector: Sequence[float], bound: float) -> list[float]:
    length = norm(vector)
    return [x * min(1.0, bound / length) if length else x for x in vector]


def blur_step(
    w: Sequence[float], task_gradient: Sequence[float], eta: float, strength: float, bound: float
) -> list[float]:
    """w <- w - eta (g + lambda (w - w_0) 1[||w - w_0|| > S]) with w_0 = 0."""
    outside = norm(w) > bound
    return [x - eta * (g + (strength * x if outside else 0.0)) for x, g in zip(w, task_gradient, strict=True)]


def blur_on_quadratic(
    a: Sequence[float], eta: float, strength: float, bound: float, steps: int
) -> list[float]:
    """Minimise 0.5 ||w - a||^2 from 0 with BLUR."""
    w = [0.0] * len(a)
    for _ in range(steps):
        w = blur_step(w, [x - y for x, y in zip(w, a, strict=True)], eta, strength, bound)
    return w


def lus_mask(delta: Sequence[float], gradient: Sequence[float], keep: float) -> list[int]:
    """The ceil(keep n) coordinates with the largest |g delta|; ties: the lowest index."""
    score = [abs(d * g) for d, g in zip(delta, gradient, strict=True)]
    order = sorted(range(len(score)), key=lambda j: (-score[j], j))
    kept = set(order[: math.ceil(keep * len(score) - 1e-9)])
    return [1 if j in kept else 0 for j in range(len(score))]


def rdp_of_sampled_gaussian(alpha: int, q: float, sigma: float) -> float:
    """The binomial sum for integer orders, in logs."""
    terms = [
        math.lgamma(alpha + 1)
        - math.lgamma(i + 1)
        - math.lgamma(alpha - i + 1)
        + (alpha - i) * math.log1p(-q)
        + i * math.log(q)
        + (i * i - i) / (2 * sigma**2)
        for i in range(alpha + 1)
    ]
    top = max(terms)
    return (top + math.log(math.fsum(math.exp(t - top) for t in terms))) / (alpha - 1)
