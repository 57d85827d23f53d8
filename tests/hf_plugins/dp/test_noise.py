"""The noise has the law it is paid for, from both sources."""

import math

import numpy as np
import pytest
import torch

from hf_plugins.dp.noise import fresh_seed, secure_uniform, seeded_gaussian, stream_seed
from hf_plugins.secure_noise import secure_gaussian


@pytest.mark.parametrize("source", ["seeded", "secure"])
def test_law_of_the_noise(source: str) -> None:
    """Mean, variance, 4th moment (3) and tail of 200,000 variates; each bound lies 6 standard errors out,

    so a false alarm has probability below 1e-8.
    """
    generator = torch.Generator().manual_seed(0)
    z = (
        seeded_gaussian((400, 500), generator=generator)
        if source == "seeded"
        else secure_gaussian((400, 500))
    )
    assert z.dtype == torch.float32
    z = z.double().flatten()
    n = len(z)
    assert abs(z.mean()) < 6 / math.sqrt(n)
    assert abs(z.var() - 1) < 6 * math.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 6 * math.sqrt(96 / n)
    above = (z > 2).double().mean()
    p = math.erfc(2 / math.sqrt(2)) / 2
    assert abs(above - p) < 6 * math.sqrt(p * (1 - p) / n)
    # Neighbours are uncorrelated.
    assert abs((z[:-1] * z[1:]).mean()) < 6 / math.sqrt(n)


def test_secure_uniform_is_never_zero_and_fills_the_interval() -> None:
    u = secure_uniform(100_000)
    assert u.min() > 0
    assert u.max() <= 1
    assert abs(np.mean(u) - 0.5) < 6 * math.sqrt(1 / 12 / len(u))


def test_streams_are_apart_and_repeatable() -> None:
    seeds = {stream_seed(7, purpose, step) for purpose in ("noise", "sample") for step in range(500)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert stream_seed(7, "noise", 3) == stream_seed(7, "noise", 3)
    assert stream_seed(8, "noise", 3) != stream_seed(7, "noise", 3)
    assert fresh_seed() != fresh_seed()
