"""Gaussian noise that is added before a release, from a seeded generator or from the operating system's."""

import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Variates summed into one, so that the bits of a single rounded one cannot be guessed (Holohan and Braghin).
_SUMMANDS = 4


def secure_gaussian(shape: Sequence[int]) -> Tensor:
    """Standard normal variates whose randomness comes from the operating system's generator.

    ``z = (n_1 + n_2 + n_3 + n_4) / 2`` of four float64 normal variates (Box-Muller), rounded to float32 once.

    Args:
        shape: Shape of the result.

    Returns:
        float32 tensor on the CPU.

    Source: Holohan and Braghin 2021, section 5.1 (the sum hides the rounding of each term), n = 2.
    """
    count = math.prod(shape)
    half = -(-count // 2)
    total = np.zeros(2 * half)
    for _ in range(_SUMMANDS):
        radius = np.sqrt(-2 * np.log(_uniform(half)))
        angle = 2 * np.pi * _uniform(half)
        total += np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return torch.from_numpy((total[:count] / math.sqrt(_SUMMANDS)).astype(np.float32)).view(tuple(shape))


def _uniform(count: int) -> np.ndarray:
    """Uniform variates in (0, 1] with 53 random bits each; never 0, so the logarithm is finite."""
    bits = np.frombuffer(os.urandom(8 * count), dtype=np.uint64) >> np.uint64(11)
    return (bits.astype(np.float64) + 1) * 2.0**-53


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
    return secure_gaussian((size,)) * std
