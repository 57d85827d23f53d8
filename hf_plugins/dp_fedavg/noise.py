"""Gaussian noise of a round: central, or as shares that users add under secure aggregation."""

import math
import os

import numpy as np
import torch
from torch import Tensor

# Variates summed into one, so that the bits of a single rounded one cannot be guessed.
_SUMMANDS = 4


def gaussian(size: int, std: float, *, generator: torch.Generator | None) -> Tensor:
    """Noise for every coordinate of an update, those included that nobody sent anything for.

    Args:
        size: Coordinates.
        std: Standard deviation, >= 0.
        generator: Seeded generator, or None for the operating system's randomness.

    Returns:
        float32 ``[size]``.
    """
    if std == 0:
        return torch.zeros(size)
    if generator is not None:
        return torch.randn(size, generator=generator) * std
    return secure_gaussian(size) * std


def secure_gaussian(size: int) -> Tensor:
    """Standard normal variates from ``os.urandom``: ``(n_1 + n_2 + n_3 + n_4) / 2``, Box-Muller in float64.

    Source: Holohan and Braghin 2021, section 5.1 (the sum hides how each term was rounded).
    """
    half = -(-size // 2)
    total = np.zeros(2 * half)
    for _ in range(_SUMMANDS):
        bits = np.frombuffer(os.urandom(16 * half), dtype=np.uint64) >> np.uint64(11)
        uniform = (bits.astype(np.float64) + 1) * 2.0**-53
        radius, angle = np.sqrt(-2 * np.log(uniform[:half])), 2 * np.pi * uniform[half:]
        total += np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return torch.from_numpy((total[:size] / math.sqrt(_SUMMANDS)).astype(np.float32))


def share_std(noise_multiplier: float, clipping_norm: float, expected_users: float) -> float:
    """Standard deviation of one user's noise share: ``sigma * S / sqrt(m)``; m shares add up to sigma * S."""
    return noise_multiplier * clipping_norm / math.sqrt(expected_users)


def missing_std(
    noise_multiplier: float, clipping_norm: float, expected_users: float, shares_received: int
) -> float:
    """Standard deviation of the noise that a sum of shares still lacks.

    ``sigma * S * sqrt(max(0, 1 - received / m))``: users who drop out take their shares with them.

    Args:
        noise_multiplier: sigma, of the whole sum.
        clipping_norm: S.
        expected_users: m, the number of shares that were planned for.
        shares_received: Shares in the sum.

    Returns:
        What the server must add on top before it looks at the sum; 0 if there are shares enough.
    """
    return noise_multiplier * clipping_norm * math.sqrt(max(0.0, 1 - shares_received / expected_users))
