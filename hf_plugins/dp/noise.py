"""Randomness of a run: seeds, streams that can repeat it, and uniform draws from the operating system."""

import hashlib
import os
import secrets
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def fresh_seed() -> int:
    """A seed of 62 bits from the operating system."""
    return secrets.randbits(62)


def stream_seed(seed: int, purpose: str, step: int) -> int:
    """Seed of one purpose in one step: a hash, so streams do not overlap and any step is reached at once.

    Args:
        seed: Seed of the run.
        purpose: For example ``noise`` or ``sample``.
        step: Number of the step over the life of the run.

    Returns:
        A number in [0, 2**63).
    """
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seeded_gaussian(shape: Sequence[int], *, generator: torch.Generator) -> Tensor:
    """Standard normal variates, float32, on the device of the generator.

    Args:
        shape: Shape of the result.
        generator: A seeded generator.

    Returns:
        Tensor of that shape.
    """
    return torch.randn(tuple(shape), generator=generator, device=generator.device)


def secure_uniform(count: int) -> np.ndarray:
    """Uniform variates in (0, 1] with 53 random bits each, from ``os.urandom``.

    Args:
        count: How many.

    Returns:
        float64 array ``[count]``; never 0, so its logarithm is finite.
    """
    bits = np.frombuffer(os.urandom(8 * count), dtype=np.uint64) >> np.uint64(11)
    return (bits.astype(np.float64) + 1) * 2.0**-53
