"""Fixed denominator, float64 sums, and the clipping norm that follows a quantile."""

import math

import pytest
import torch

from hf_plugins.dp_fedavg.aggregation import (
    RunningSum,
    next_clipping_norm,
    private_step,
    update_noise_multiplier,
)


def test_denominator_is_fixed() -> None:
    """Twice as many users than expected give twice the step: sum / (q K), whoever came."""
    one, two = RunningSum(2), RunningSum(2)
    for _ in range(3):
        one.add(torch.tensor([1.0, -2.0]))
    for _ in range(6):
        two.add(torch.tensor([1.0, -2.0]))
    steps = [private_step(s.sum_D, torch.zeros(2), expected_users=4.0, server_lr=2.0) for s in (one, two)]
    assert steps[0].tolist() == [1.5, -3.0]
    assert steps[1].tolist() == [3.0, -6.0]
    assert (one.count, two.count) == (3, 6)
    noisy = private_step(one.sum_D, torch.tensor([4.0, 0.0]), expected_users=4.0, server_lr=2.0)
    assert noisy.tolist() == [3.5, -3.0]


def test_sum_keeps_what_float32_loses() -> None:
    """2^24 + 1 is no float32."""
    total = RunningSum(1)
    total.add(torch.tensor([2.0**24]))
    total.add(torch.tensor([1.0]))
    assert float(total.sum_D) == 2.0**24 + 1


@pytest.mark.parametrize("start", [0.1, 1000.0])
def test_quantile_converges_to_the_norms(start: float) -> None:
    """All norms 10, gamma 0.5, lr 0.2: into [9, 11] from both sides in fewer than 200 rounds."""
    bound, inside = start, None
    for number in range(200):
        bound = next_clipping_norm(bound, float(bound >= 10), quantile=0.5, learning_rate=0.2)
        if inside is None and 9 <= bound <= 11:
            inside = number
    assert inside is not None
    assert 9 <= bound <= 11.1


def test_quantile_by_hand() -> None:
    """b = 0.2 within, gamma = 0.5: C grows by exp(0.2 * 0.3)."""
    assert next_clipping_norm(2.0, 0.2, quantile=0.5, learning_rate=0.2) == pytest.approx(2 * math.exp(0.06))


def test_budget_split() -> None:
    """sigma = 1, sigma_b = 5: (1 - 1/100)^(-1/2) = 1.005038."""
    assert update_noise_multiplier(1.0, 5.0) == pytest.approx(1.005038, abs=1e-6)
    assert update_noise_multiplier(0.0, 5.0) == 0.0
    with pytest.raises(ValueError, match="count_noise_std must be > noise_multiplier / 2"):
        update_noise_multiplier(2.0, 1.0)


def test_error_floor_on_a_quadratic() -> None:
    """w <- w - eta (w - a) + noise: the stationary error is proportional to d sigma^2 S^2 / m^2.

    Double S: 4 times; double m: a quarter. 300 rounds with d = 2,000 coordinates leave an error of the
    estimate below 1 %; 5 % are allowed.
    """

    def floor(bound: float, users: float) -> float:
        generator = torch.Generator().manual_seed(0)
        w, found = torch.zeros(2000, dtype=torch.float64), []
        for number in range(400):
            noise = torch.randn(2000, generator=generator) * bound
            w = w + private_step(-0.2 * users * w, noise, expected_users=users, server_lr=1.0)
            if number > 100:
                found.append(float(w.square().sum()))
        return sum(found) / len(found)

    base = floor(0.2, 50)
    assert floor(0.4, 50) / base == pytest.approx(4.0, rel=0.05)
    assert floor(0.2, 100) / base == pytest.approx(0.25, rel=0.05)


def test_denominator_must_be_positive() -> None:
    with pytest.raises(ValueError, match="It is sample rate times users"):
        private_step(torch.zeros(1), torch.zeros(1), expected_users=0, server_lr=1.0)
