"""The law of the operating system's noise, its shapes, and that no two draws are the same."""

import math

import pytest
import torch

from hf_plugins.secure_noise import gaussian, secure_gaussian

# The standard error of a standard deviation over D normal variates is 1 / sqrt(2 D) = 0.16 %; 1 % is six.
D = 200_000


def test_secure_noise_never_repeats_and_takes_any_shape() -> None:
    assert not torch.equal(secure_gaussian((9,)), secure_gaussian((9,)))
    assert secure_gaussian((3, 1, 5)).shape == (3, 1, 5)
    assert secure_gaussian(()).shape == ()
    assert secure_gaussian((0,)).shape == (0,)


def test_noise_from_the_operating_system_is_standard_normal() -> None:
    noise = secure_gaussian((D,))
    assert float(noise.std()) == pytest.approx(1.0, rel=0.01)
    assert abs(float(noise.mean())) < 6 / math.sqrt(D)
    # Fourth moment of a standard normal is 3, its standard error sqrt(96 / D) = 0.022.
    assert float(noise.double().pow(4).mean()) == pytest.approx(3.0, abs=6 * math.sqrt(96 / D))
    assert not torch.equal(secure_gaussian((7,)), secure_gaussian((7,)))
    assert gaussian(3, 0.0, generator=None).tolist() == [0, 0, 0]
    assert float(gaussian(D, 2.0, generator=None).std()) == pytest.approx(2.0, rel=0.01)
