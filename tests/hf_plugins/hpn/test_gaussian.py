"""Exact cost of Gaussian releases: the dossier's values, an integral, and the noise for a budget."""

import math

import pytest

from hf_plugins.hpn.gaussian import (
    combined_multiplier,
    gaussian_delta,
    gaussian_epsilon,
    noise_multiplier_for,
)
from tests.hf_plugins.hpn import reference


@pytest.mark.parametrize(
    ("noise_multiplier", "epsilon"), [(0.1, 91.817), (0.6002, 8.0), (1.3906, 3.0), (3.7306, 1.0)]
)
def test_epsilon_of_an_encoding(noise_multiplier: float, epsilon: float) -> None:
    """Dossier: analytic Gaussian at delta 1e-5; the multipliers are rounded to four digits."""
    assert gaussian_epsilon(noise_multiplier, delta=1e-5) == pytest.approx(epsilon, abs=1e-3)


@pytest.mark.parametrize(("noise_multiplier", "epsilon"), [(1.0, 1.0), (0.5, 3.0), (3.0, 0.2)])
def test_delta_is_the_integral(noise_multiplier: float, epsilon: float) -> None:
    """Hockey-stick divergence of two Gaussians, summed on a grid; the grid's error is about 1e-8."""
    expected = reference.gaussian_delta(noise_multiplier, epsilon)
    assert gaussian_delta(noise_multiplier, epsilon) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0, 8.0, 50.0])
def test_noise_for_a_budget_keeps_it_and_no_more(epsilon: float) -> None:
    noise = noise_multiplier_for(epsilon, delta=1e-5)
    assert gaussian_epsilon(noise, delta=1e-5) <= epsilon * (1 + 1e-8)
    assert gaussian_epsilon(noise * 0.999, delta=1e-5) > epsilon


def test_limits() -> None:
    assert gaussian_epsilon(0.0, delta=1e-5) == math.inf
    assert gaussian_epsilon(1e6, delta=1e-5) == 0.0
    assert 1e3 < gaussian_epsilon(0.01, delta=1e-5) < 1e4  # no overflow of exp(epsilon)


def test_releases_compose_like_squared_signal() -> None:
    """Four releases at multiplier 2 are one at 1: 1 / sqrt(4 / 4)."""
    assert combined_multiplier([2.0] * 4) == pytest.approx(1.0)
    assert combined_multiplier([3.0, 4.0]) == pytest.approx(2.4)  # 1 / sqrt(1/9 + 1/16) = 12 / 5
    assert combined_multiplier([1.0, 0.0]) == 0.0
    assert combined_multiplier([]) == math.inf


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1])
def test_wrong_delta(delta: float) -> None:
    with pytest.raises(ValueError, match="Take less than 1 / number of examples"):
        gaussian_epsilon(1.0, delta=delta)
    with pytest.raises(ValueError, match="delta must lie in \\(0, 1\\)"):
        noise_multiplier_for(1.0, delta=delta)


def test_wrong_multiplier_and_budget() -> None:
    with pytest.raises(ValueError, match="noise_multiplier must be a finite number >= 0; got .*-1"):
        gaussian_epsilon(-1.0, delta=1e-5)
    with pytest.raises(ValueError, match="epsilon must be a finite number > 0; got .*inf. Infinity means no"):
        noise_multiplier_for(math.inf, delta=1e-5)
