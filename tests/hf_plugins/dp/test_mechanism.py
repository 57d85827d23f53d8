"""One step: sums, noise of the right size, a constant divisor, one release."""

import math

import pytest
import torch

from hf_plugins.dp.mechanism import NoisySum


def _step(noise: float, expected: float, shape: tuple[int, ...] = (2,), bound: float = 0.5) -> NoisySum:
    return NoisySum(
        [torch.Size(shape)],
        torch.device("cpu"),
        max_grad_norm=bound,
        noise_multiplier=noise,
        expected_units=expected,
    )


def test_divisor_is_the_expected_number_of_units() -> None:
    """Two chunks (1, 2) and (3, 4), three units expected: (4/3, 2), however many units came."""
    step = _step(0.0, 3)
    step.add([torch.tensor([1.0, 2.0])])
    step.add([torch.tensor([3.0, 4.0])])
    step.add([None])
    step.add_noise(lambda shape, device: torch.ones(shape))
    torch.testing.assert_close(step.release()[0], torch.tensor([4 / 3, 2.0]))


def test_noise_is_multiplier_times_norm_over_units() -> None:
    """sigma 2.15, C 0.1, 2048 units: std of the mean 2.15 * 0.1 / 2048 = 1.0498e-4; 6 standard errors."""
    step = _step(2.15, 2048, (200_000,), bound=0.1)
    generator = torch.Generator().manual_seed(0)
    step.add_noise(lambda shape, device: torch.randn(shape, generator=generator))
    z = step.release()[0].double()
    std = 2.15 * 0.1 / 2048
    assert std == pytest.approx(1.0498e-4, rel=1e-4)
    assert abs(z.std() / std - 1) < 6 / math.sqrt(2 * len(z))


def test_empty_step_releases_noise_only() -> None:
    step = _step(3.0, 4)
    step.add_noise(lambda shape, device: torch.ones(shape))
    # 3 * 0.5 * 1 / 4
    assert step.release()[0].tolist() == [0.375, 0.375]


def test_noise_pays_for_one_release() -> None:
    step = _step(1.0, 1)
    step.release()
    with pytest.raises(RuntimeError, match="its noise pays for one use only"):
        step.release()
    with pytest.raises(RuntimeError, match="open a new one for more records"):
        step.add([torch.zeros(2)])
