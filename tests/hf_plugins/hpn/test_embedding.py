"""Client encodings: golden numbers, norms, sensitivity, the kernel, noise, and what is refused."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_plugins.hpn.embedding import (
    Encoder,
    encode,
    fourier_features,
    frequencies,
    label_histogram,
    mean_embedding,
    median_bandwidth,
    projected_features,
    projection,
)
from tests.hf_plugins.hpn import reference


def _released(dim: int = 3072, num_features: int = 6) -> torch.Tensor:
    return frequencies(dim, num_features, bandwidth=127.0, seed=1234)


def test_golden_frequencies_and_features() -> None:
    """Dossier: numpy seed 1234, randn(3, 3072) / sqrt(127); phi of 0.01 everywhere."""
    table = _released()
    torch.testing.assert_close(
        table[0, :3],
        torch.tensor([0.04183311, -0.105682, 0.12713219], dtype=torch.float64),
        atol=5e-9,
        rtol=0,
    )
    assert float(table[-1, -1]) == pytest.approx(-0.028981117, abs=5e-10)
    phi = fourier_features(torch.full((1, 3072), 0.01, dtype=torch.float64), table)[0]
    expected = [0.5749007, 0.57718459, 0.57708463, 0.05312742, 0.01383064, 0.01751178]
    torch.testing.assert_close(phi, torch.tensor(expected, dtype=torch.float64), atol=5e-9, rtol=0)
    assert float(phi.square().sum()) == pytest.approx(1.0, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 4), st.sampled_from([0.0, 1.0, 1e3, 1e30]))
def test_norms_are_one_and_at_most_one(dim: int, num: int, labels: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(dim * 100 + num)
    x = scale * torch.randn(num, dim, generator=generator)
    phi = fourier_features(x, _released(dim, 4))
    torch.testing.assert_close(phi.norm(dim=1), torch.ones(num, dtype=torch.float64))
    y = torch.randint(labels, (num,), generator=generator)
    assert float(mean_embedding(phi, y, labels).norm()) <= 1 + 1e-12


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(0, 2**31), st.sampled_from(["rff", "frozen-features", "histogram"]))
def test_replacing_one_example_stays_within_sensitivity(num: int, seed: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    encoder = Encoder(kind=kind, num_labels=3, dim=5, num_features=4)
    x, y = torch.randn(num, 5, generator=generator), torch.randint(3, (num,), generator=generator)
    other_x, other_y = x.clone(), y.clone()
    row = int(torch.randint(num, (), generator=generator))
    other_x[row] = 100 * torch.randn(5, generator=generator)
    other_y[row] = torch.randint(3, (), generator=generator)
    moved = float((encoder.mean(x, y) - encoder.mean(other_x, other_y)).norm())
    assert moved <= encoder.sensitivity(num) + 1e-12


def test_sensitivity_is_reached() -> None:
    """One example, frequency 1: phi(0) = (1, 0), phi(pi) = (-1, 0), so the mean moves by 2 = 2 / n."""
    table = torch.ones(1, 1, dtype=torch.float64)
    first, second = fourier_features(torch.tensor([[0.0], [math.pi]], dtype=torch.float64), table)
    assert float((first - second).norm()) == pytest.approx(
        Encoder(kind="rff", num_labels=1, dim=1).sensitivity(1)
    )
    histogram = Encoder(kind="histogram", num_labels=2)
    moved = histogram.mean(torch.zeros(1), torch.tensor([0])) - histogram.mean(
        torch.zeros(1), torch.tensor([1])
    )
    assert float(moved.norm()) == pytest.approx(histogram.sensitivity(1))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 7), st.integers(1, 5), st.integers(1, 3))
def test_equals_the_reference(num: int, dim: int, labels: int) -> None:
    rng = np.random.default_rng(num * 10 + dim)
    x, y = rng.normal(size=(num, dim)), rng.integers(labels, size=num)
    table = _released(dim, 4)
    fast = mean_embedding(fourier_features(torch.from_numpy(x), table), torch.from_numpy(y), labels)
    slow = reference.mean_embedding(x.tolist(), y.tolist(), table.numpy(), labels)
    np.testing.assert_allclose(fast.numpy(), slow, atol=1e-12)


def test_order_of_the_data_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 8, generator=generator), torch.randint(4, (50,), generator=generator)
    encoder = Encoder(kind="rff", num_labels=4, dim=8)
    order = torch.randperm(50, generator=generator)
    torch.testing.assert_close(encoder.mean(x, y), encoder.mean(x[order], y[order]), atol=1e-12, rtol=0)
    halves = (encoder.mean(x[:20], y[:20]) * 20 + encoder.mean(x[20:], y[20:]) * 30) / 50
    torch.testing.assert_close(encoder.mean(x, y), halves, atol=1e-12, rtol=0)


def test_products_of_features_are_a_gaussian_kernel() -> None:
    """2,048 frequencies: the estimate's standard deviation is below 1/sqrt(2048) = 0.022, for 20 pairs."""
    generator = torch.Generator().manual_seed(0)
    x, y = 3 * torch.randn(20, 16, generator=generator), 3 * torch.randn(20, 16, generator=generator)
    table = _released(16, 4096)
    product = (fourier_features(x, table) * fourier_features(y, table)).sum(dim=1)
    kernel = (-(x - y).double().square().sum(dim=1) / 254).exp()
    assert float((product - kernel).abs().max()) < 0.05
    assert float(kernel.min()) < 0.5  # the pairs do differ


def test_global_random_states_are_left_alone() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    encoder = Encoder(kind="rff", num_labels=2, dim=4)
    x, y = torch.ones(3, 4), torch.tensor([0, 1, 1])
    encode(x, y, encoder, noise_multiplier=1.0, generator=torch.Generator().manual_seed(1))
    median_bandwidth(torch.arange(8.0)[:, None], generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])


def test_noise_has_the_stated_size() -> None:
    """n = 4, multiplier 3: standard deviation 3 * 2 / 4 = 1.5. 40,000 draws: 5 sigma is 0.027."""
    encoder = Encoder(kind="rff", num_labels=1, dim=2, num_features=40_000)
    x, y = torch.ones(4, 2), torch.zeros(4, dtype=torch.long)
    found = encode(x, y, encoder, noise_multiplier=3.0, generator=torch.Generator().manual_seed(0))
    noise = found.vector - encoder.mean(x, y)
    assert float(noise.std()) == pytest.approx(1.5, abs=0.027)
    assert abs(float(noise.mean())) < 0.04
    assert (found.num_examples, found.noise_multiplier) == (4, 3.0)


def test_encoding_tells_its_epsilon() -> None:
    encoder = Encoder(kind="histogram", num_labels=2)
    args = (torch.zeros(2), torch.tensor([0, 1]), encoder)
    found = encode(*args, noise_multiplier=0.1, generator=torch.Generator().manual_seed(0))
    assert found.epsilon(1e-5) == pytest.approx(91.817, abs=1e-3)
    quiet = encode(*args, noise_multiplier=0.0, generator=torch.Generator().manual_seed(0))
    assert quiet.epsilon(1e-5) == math.inf
    assert quiet.vector.tolist() == [0.5, 0.5]


def test_histogram_and_sizes() -> None:
    assert label_histogram(torch.tensor([0, 2, 2, 1]), 4).tolist() == [0.25, 0.25, 0.5, 0.0]
    assert Encoder(kind="rff", num_labels=10, dim=3072).size == 60  # CIFAR-10 in the release
    assert Encoder(kind="rff", num_labels=62, dim=784, num_features=2).size == 124  # FEMNIST
    assert Encoder(kind="histogram", num_labels=7).size == 7


def test_median_bandwidth_puts_typical_pairs_at_one_over_e() -> None:
    """Two clouds of points: every pair of 0 and 2 has squared distance 4 or 0; between three points 0, 2, 4
    the squared distances are 4, 4, 16, their median 4, half of it 2."""
    points = torch.tensor([[0.0], [2.0], [4.0]])
    found = median_bandwidth(points, generator=torch.Generator().manual_seed(0), num_pairs=999)
    assert found == pytest.approx(2.0)
    assert math.exp(-4 / (2 * found)) == pytest.approx(1 / math.e)


def test_projected_features_are_short_and_keep_directions() -> None:
    table = projection(50, 400)
    x = torch.randn(10, 50, generator=torch.Generator().manual_seed(0))
    out = projected_features(torch.cat([x, 7 * x, torch.zeros(1, 50)]), table)
    assert float(out.norm(dim=1).max()) <= 1 + 1e-12
    torch.testing.assert_close(out[:10], out[10:20])
    assert float(out[20].abs().max()) == 0.0
    assert float(out[:20].norm(dim=1).min()) > 0.8  # cut from above only, near 1 on average


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="num_features must be even and >= 2; got .*3"):
        frequencies(4, 3, bandwidth=1.0, seed=0)
    with pytest.raises(ValueError, match="bandwidth must be a finite number > 0; got .*0"):
        frequencies(4, 2, bandwidth=0.0, seed=0)
    with pytest.raises(
        ValueError, match=r"labels must lie in 0\.\..*2; got 0\.\.3\. .*Set num_labels to the largest"
    ):
        label_histogram(torch.tensor([0, 3]), 3)
    with pytest.raises(ValueError, match="this client has no example to encode; give it data"):
        label_histogram(torch.tensor([], dtype=torch.long), 3)
    with pytest.raises(ValueError, match="the median distance needs at least two inputs; got .*1"):
        median_bandwidth(torch.zeros(1, 2), generator=torch.Generator())
    with pytest.raises(ValueError, match="half of the inputs or more are equal; give bandwidth"):
        median_bandwidth(torch.zeros(9, 2), generator=torch.Generator())
    with pytest.raises(ValueError, match="encoder must be one of .*rff, rff-median"):
        Encoder(kind="pca", num_labels=2, dim=2)
    with pytest.raises(ValueError, match="num_labels must be >= 1; got .*0. Without labels, use 1"):
        Encoder(kind="histogram", num_labels=0)
    with pytest.raises(ValueError, match="dim must be the number of input dimensions, >= 1; got .*0"):
        Encoder(kind="rff", num_labels=2)
    encoder = Encoder(kind="rff", num_labels=2, dim=3)
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="inputs have 4.* dimensions; the encoder was made for .*3"):
        encoder.mean(torch.zeros(2, 4), labels)
    with pytest.raises(ValueError, match="inputs and labels must be as many; got .*3 and 2"):
        encoder.mean(torch.zeros(3, 3), labels)
    with pytest.raises(ValueError, match="inputs hold NaN or infinity; clean the data"):
        encoder.mean(torch.full((2, 3), math.nan), labels)
    with pytest.raises(ValueError, match="noise_multiplier must be a finite number >= 0; got .*-1"):
        encode(torch.zeros(2, 3), labels, encoder, noise_multiplier=-1.0, generator=torch.Generator())
