"""Randomness without state: every draw of a run has a seed of its own, made from the run's seed and a name.

A resumed run and a run on many machines draw the same cohorts, batches and noise as an uninterrupted run on
one machine, because nothing depends on what was drawn before.
"""

import hashlib

import torch


def seed_for(seed: int, *name: str | int) -> int:
    """Seed of one named draw.

    Args:
        seed: Seed of the run.
        *name: What is drawn, for example ``("batches", round_index, client_id)``.

    Returns:
        A number in ``0 .. 2**63 - 1``; SHA-256 of the seed and the name.
    """
    text = "\x1f".join(map(str, (seed, *name))).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def generator_for(seed: int, *name: str | int) -> torch.Generator:
    """CPU generator of one named draw; see `seed_for`."""
    return torch.Generator().manual_seed(seed_for(seed, *name))
