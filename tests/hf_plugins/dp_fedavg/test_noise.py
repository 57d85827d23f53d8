"""The law of the noise: central, shares, shares with dropouts, the operating system's."""

import math

import pytest
import torch

from hf_plugins.dp_fedavg.noise import missing_std, share_std
from hf_plugins.secure_noise import gaussian

# m = 50, S = 0.2, sigma = 0.95: the average carries noise of 0.95 * 0.2 / 50 = 0.0038 a coordinate.
M, S, SIGMA, D = 50, 0.2, 0.95, 200_000
# The standard error of a standard deviation over D normal variates is 1 / sqrt(2 D) = 0.16 %; 1 % is six.
TOLERANCE = 0.01


def test_central_noise_on_the_average() -> None:
    noise = gaussian(D, SIGMA * S, generator=torch.Generator().manual_seed(0)) / M
    assert float(noise.std()) == pytest.approx(0.0038, rel=TOLERANCE)
    assert abs(float(noise.mean())) < 6 * 0.0038 / math.sqrt(D)
    assert int((noise == 0).sum()) == 0


def test_shares_add_up_to_the_same_law() -> None:
    std = share_std(SIGMA, S, M)
    assert std == pytest.approx(0.95 * 0.2 / math.sqrt(50))
    total = sum(gaussian(D, std, generator=torch.Generator().manual_seed(k)) for k in range(M))
    assert float(total.std()) / M == pytest.approx(0.0038, rel=TOLERANCE)


@pytest.mark.parametrize("received", [0, 1, 30, 50, 60])
def test_missing_shares_are_made_up_for(received: int) -> None:
    """received * sigma^2 S^2 / m + missing^2 >= sigma^2 S^2, with equality up to m shares."""
    have = received * share_std(SIGMA, S, M) ** 2
    total = have + missing_std(SIGMA, S, M, received) ** 2
    assert total == pytest.approx(max(1.0, received / M) * (SIGMA * S) ** 2)
