"""What one Gaussian release costs, exactly, and the noise that a budget needs.

A value whose L2 sensitivity is D leaves with noise N(0, (noise_multiplier * D)^2). Neighbours differ by
replacing one example, because the number of examples is public here. Releases compose exactly: k of them with
multipliers s_i cost as much as one with multiplier 1 / sqrt(sum 1 / s_i^2).
"""

import math
from collections.abc import Iterable

import torch

_LARGEST_EPSILON = 1e6


def _log_cdf(x: float) -> float:
    return float(torch.special.log_ndtr(torch.tensor(x, dtype=torch.float64)))


def gaussian_delta(noise_multiplier: float, epsilon: float) -> float:
    """Smallest delta at which one release is (epsilon, delta)-private.

    ``delta = Phi(m/2 - eps/m) - exp(eps) * Phi(-m/2 - eps/m)`` with ``m = 1 / noise_multiplier``.

    Args:
        noise_multiplier: Noise standard deviation over the sensitivity, > 0.
        epsilon: Privacy loss, >= 0.

    Returns:
        Delta in [0, 1).

    Source: Balle and Wang 2018, theorem 8.
    """
    mu = 1 / noise_multiplier
    return math.exp(_log_cdf(mu / 2 - epsilon / mu)) - math.exp(epsilon + _log_cdf(-mu / 2 - epsilon / mu))


def gaussian_epsilon(noise_multiplier: float, *, delta: float) -> float:
    """Epsilon of one release, exact to 1e-9 relative.

    Args:
        noise_multiplier: Noise standard deviation over the sensitivity; 0 is no privacy.
        delta: Failure probability, in (0, 1).

    Returns:
        Epsilon >= 0; infinity without noise, and above a million.

    Raises:
        ValueError: If a number is out of range.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie in (0, 1); got {delta}. Take less than 1 / number of examples.")
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise ValueError(f"noise_multiplier must be a finite number >= 0; got {noise_multiplier}.")
    if noise_multiplier == 0 or gaussian_delta(noise_multiplier, _LARGEST_EPSILON) > delta:
        return math.inf
    if gaussian_delta(noise_multiplier, 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while gaussian_delta(noise_multiplier, high) > delta:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(noise_multiplier, middle) > delta else (low, middle)
    return high


def noise_multiplier_for(epsilon: float, *, delta: float) -> float:
    """Smallest noise multiplier with which one release costs at most ``epsilon``.

    Args:
        epsilon: Budget, > 0.
        delta: Failure probability, in (0, 1).

    Returns:
        Noise multiplier, exact to 1e-9 relative and never too small.

    Raises:
        ValueError: If the budget is not a finite number above 0, or delta is out of range.
    """
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be a finite number > 0; got {epsilon}. Infinity means no noise: 0.")
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie in (0, 1); got {delta}. Take less than 1 / number of examples.")
    low, high = 0.0, 1.0
    while gaussian_delta(high, epsilon) > delta:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(middle, epsilon) > delta else (low, middle)
    return high


def combined_multiplier(noise_multipliers: Iterable[float]) -> float:
    """The single release that costs as much as all of these together.

    Args:
        noise_multipliers: One per release, each >= 0.

    Returns:
        ``1 / sqrt(sum 1 / s^2)``; 0 if any release has no noise, infinity if there is none.
    """
    multipliers = list(noise_multipliers)
    if any(multiplier == 0 for multiplier in multipliers):
        return 0.0
    total = math.fsum(multiplier**-2 for multiplier in multipliers)
    return total**-0.5 if total else math.inf
