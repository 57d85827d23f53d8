"""FedEx by hand, and on a bandit with one best arm."""

import math

import pytest
import torch

from hf_plugins.hpn.exponentiated import FedEx


def test_one_update_by_hand() -> None:
    """Two arms at 1/2, losses 1 (arm 0) and 0 (arm 1), equal weights: baseline 1/2, gradients
    0.5 * 0.5 / 0.5 = +-0.5; eta = sqrt(2 ln 2) / 0.5, so logits move by -+sqrt(2 ln 2)."""
    fedex = FedEx(torch.tensor([[0.0], [1.0]]))
    fedex.update(torch.tensor([0, 1]), torch.tensor([1.0, 0.0]), torch.tensor([3.0, 3.0]))
    step = math.sqrt(2 * math.log(2))
    odds = float(fedex.theta_A[1] / fedex.theta_A[0])
    assert odds == pytest.approx(math.exp(2 * step))
    assert fedex.best().tolist() == [1.0]


def test_weights_count() -> None:
    """Weights 3 and 1: baseline 3/4, gradients 0.75 * 0.25 / 0.5 and -0.25 * 0.75 / 0.5: equal size."""
    fedex = FedEx(torch.tensor([[0.0], [1.0]]))
    fedex.update(torch.tensor([0, 1]), torch.tensor([1.0, 0.0]), torch.tensor([3.0, 1.0]))
    odds = float(fedex.theta_A[1] / fedex.theta_A[0])
    assert odds == pytest.approx(math.exp(2 * math.sqrt(2 * math.log(2))))


def test_equal_losses_change_nothing_and_state_comes_back() -> None:
    fedex = FedEx(torch.arange(4.0)[:, None])
    fedex.update(torch.tensor([0, 3]), torch.tensor([2.0, 2.0]), torch.ones(2))
    torch.testing.assert_close(fedex.theta_A, torch.full((4,), 0.25, dtype=torch.float64))
    fedex.update(torch.tensor([0, 3]), torch.tensor([2.0, 1.0]), torch.ones(2))
    other = FedEx(torch.zeros(4, 1))
    other.load_state_dict(fedex.state_dict())
    assert torch.equal(other.theta_A, fedex.theta_A)
    assert torch.equal(other.best(), fedex.best())


def test_finds_the_common_optimum() -> None:
    generator = torch.Generator().manual_seed(0)
    fedex = FedEx(torch.arange(8.0)[:, None])
    for _ in range(150):
        arms = fedex.sample(10, generator=generator)
        losses = (arms - 5).abs() / 8 + 0.05 * torch.randn(10, generator=generator)
        fedex.update(arms, losses, torch.ones(10))
    assert fedex.best().tolist() == [5.0]


def test_needs_two_arms() -> None:
    with pytest.raises(ValueError, match="FedEx needs at least two configs to choose from; got .*1"):
        FedEx(torch.zeros(1, 2))
