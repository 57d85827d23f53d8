"""DP-SGD on a path: the sum against a loop over samples, the noise against its law, empty batches."""

import pytest
import torch

from hf_plugins.dpnas.config import SHAPES
from hf_plugins.dpnas.genotypes import RELEASED
from hf_plugins.dpnas.network import DPNASNet
from hf_plugins.dpnas.path_step import clipped_gradient_sum, noised_mean, noisy_accuracy, poisson_batch
from tests.hf_plugins.dpnas.reference import clipped_sum

SHAPE = {**SHAPES["mnist"], "image_size": 8, "stem_channels": 8, "cell_channels": (8, 8, 8), "groups": 4}


def net_and_batch(num: int = 5) -> tuple[DPNASNet, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    net = DPNASNet(RELEASED["mnist"], **SHAPE)
    return net, torch.randn(num, 1, 8, 8, generator=generator), torch.randint(10, (num,), generator=generator)


@pytest.mark.parametrize("chunk_size", [1, 2, 64])
@pytest.mark.parametrize("max_grad_norm", [0.5, 1e6])
def test_sum_equals_a_loop_over_samples(chunk_size: int, max_grad_norm: float) -> None:
    net, images, labels = net_and_batch()
    total, share = clipped_gradient_sum(
        net, images, labels, max_grad_norm=max_grad_norm, chunk_size=chunk_size
    )
    for name, expected in clipped_sum(net, images, labels, max_grad_norm).items():
        torch.testing.assert_close(total[name], expected, atol=1e-5, rtol=1e-4)
    assert share == (1.0 if max_grad_norm == 0.5 else 0.0)


def test_one_record_moves_the_sum_by_at_most_the_bound() -> None:
    net, images, labels = net_and_batch(6)
    one, _ = clipped_gradient_sum(net, images, labels, max_grad_norm=0.3)
    other, _ = clipped_gradient_sum(net, images[:-1], labels[:-1], max_grad_norm=0.3)
    moved = sum((one[name] - other[name]).square().sum() for name in one).sqrt()
    assert moved.item() == pytest.approx(0.3, rel=1e-3)


def test_an_empty_batch_is_noise_alone() -> None:
    net, images, labels = net_and_batch(0)
    total, share = clipped_gradient_sum(net, images, labels, max_grad_norm=1.0)
    assert share == 0
    assert not any(value.any() for value in total.values())


def test_noise_has_the_stated_spread() -> None:
    """std = 0.8 * 0.5 / 20 = 0.02; 40,000 draws estimate it to 0.35 % (1 sigma), 6 of them is a false alarm
    of 1e-9.
    """
    total = {"w": torch.full((200, 200), 10.0)}
    mean = noised_mean(
        total,
        noise_multiplier=0.8,
        max_grad_norm=0.5,
        expected_batch_size=20,
        generator=torch.Generator().manual_seed(0),
    )
    assert mean["w"].std().item() == pytest.approx(0.02, rel=0.022)
    assert mean["w"].mean().item() == pytest.approx(0.5, abs=6 * 0.02 / 200)


def test_poisson_batches_have_binomial_sizes() -> None:
    """1,000 records at rate .05: mean 50, variance 47.5; over 400 batches the mean is within 6 *
    sqrt(47.5/400) = 2.1.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([len(poisson_batch(1000, 0.05, generator)) for _ in range(400)], dtype=torch.float64)
    assert abs(sizes.mean() - 50) < 2.1
    assert 47.5 * 0.58 < sizes.var() < 47.5 * 1.42
    assert len(poisson_batch(7, 1.0, generator)) == 7


def test_rewards_are_noisy_counts_over_a_fixed_size() -> None:
    net, images, _ = net_and_batch(8)
    labels = net(images).argmax(1)
    labels[0] = (labels[0] + 1) % 10
    generator = torch.Generator().manual_seed(0)
    plain = noisy_accuracy(net, images, labels, expected_size=10, noise_multiplier=0, generator=generator)
    assert plain == pytest.approx(0.7)
    draws = torch.tensor(
        [
            noisy_accuracy(net, images, labels, expected_size=10, noise_multiplier=2, generator=generator)
            for _ in range(300)
        ]
    )
    # Standard deviation 2 / 10, 300 draws: mean within 6 * .2 / sqrt(300) = .07, spread within 25 %.
    assert abs(draws.mean().item() - 0.7) < 0.07
    assert draws.std().item() == pytest.approx(0.2, rel=0.25)
    assert (
        noisy_accuracy(net, images[:0], labels[:0], expected_size=4, noise_multiplier=0, generator=generator)
        == 0
    )
