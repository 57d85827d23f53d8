"""Method 1: bit-exact under uniform pads, wrong answers found, pads used once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_plugins.tee_split.masking import (
    PRIME,
    MaskedLinear,
    MaskError,
    decode,
    encode,
    freivalds,
    masked_scores,
    product,
    uniform,
)
from tests.hf_plugins.tee_split.reference import integer_product

MODULUS = {"ring": 2**64, "prime": PRIME}
both = pytest.mark.parametrize("domain", ["ring", "prime"])


def residues(shape: tuple, domain: str, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, MODULUS[domain], shape, dtype=np.uint64)


def test_prime_is_prime_and_keeps_float64_exact() -> None:
    """4096 products of two residues stay below 2^53."""
    assert all(PRIME % i for i in range(2, int(PRIME**0.5) + 1))
    assert 4096 * (PRIME - 1) ** 2 < 2**53


@both
@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_product_is_that_of_unbounded_integers(domain: str, n: int, i: int, o: int, seed: int) -> None:
    x, w = residues((n, i), domain, seed), residues((o, i), domain, seed + 1)
    assert product(x, w, domain=domain).tolist() == integer_product(x.tolist(), w.tolist(), MODULUS[domain])


def test_long_sums_in_the_prime_field_are_exact() -> None:
    x = np.full((1, 9000), PRIME - 1, np.uint64)
    assert product(x, x, domain="prime").tolist() == [[9000 * (PRIME - 1) ** 2 % PRIME]]


@both
def test_masked_layer_equals_the_integer_product_with_bias(domain: str) -> None:
    rng = np.random.default_rng(0)
    bits = 12 if domain == "ring" else 4
    w, b, x = rng.normal(size=(5, 7)), rng.normal(size=5), rng.normal(size=(3, 7))
    layer = MaskedLinear(w, b, fraction_bits=bits, domain=domain)
    mask = layer.draw(3)
    sent = layer.mask(x, mask)
    found = layer.unmask(sent, layer.device(sent), mask)
    exact = np.rint(x * 2**bits) @ np.rint(w * 2**bits).T + np.rint(b * 2 ** (2 * bits))
    assert np.array_equal(found, exact / 2 ** (2 * bits))
    # The quantisation is all that separates it from real arithmetic.
    assert np.abs(found - (x @ w.T + b)).max() < 7 * 4 * 2.0**-bits


@both
def test_device_sees_uniform_numbers(domain: str) -> None:
    """Mean of 20,000 uniform residues: standard error M / sqrt(12 n); 6 of them leave a false alarm below
    1e-8."""
    layer = MaskedLinear(np.ones((1, 20_000)), fraction_bits=4, domain=domain)
    sent = layer.mask(np.full((1, 20_000), 3.0), layer.draw(1)).astype(np.float64) / MODULUS[domain]
    assert abs(sent.mean() - 0.5) < 6 / (12 * 20_000) ** 0.5


@both
def test_scores_under_two_pads_are_exact_and_cost_three_products(domain: str) -> None:
    q, k = residues((3, 5), domain, 1), residues((4, 5), domain, 2)
    found, own = masked_scores(q, k, domain=domain)
    assert found.tolist() == integer_product(q.tolist(), k.tolist(), MODULUS[domain])
    assert own == 3


@both
def test_every_single_changed_entry_is_found(domain: str) -> None:
    """Soundness 2^-40 a try: 24 tries raise a false alarm (a miss) with probability below 1e-10."""
    x, w = residues((4, 6), domain), residues((6, 6), domain)
    right = product(x, w, domain=domain)
    assert freivalds(x, w, right, domain=domain)
    for row in range(4):
        for column in range(6):
            wrong = right.copy()
            # In the ring a difference of 2^63 is the hardest to see: half of all factors annihilate it.
            change = 2**63 if domain == "ring" else 1
            wrong[row, column] = (int(wrong[row, column]) + change) % MODULUS[domain]
            assert not freivalds(x, w, wrong, domain=domain)


def test_wrong_answer_is_not_unmasked() -> None:
    layer = MaskedLinear(np.eye(3))
    mask = layer.draw(1)
    sent = layer.mask(np.ones((1, 3)), mask)
    with pytest.raises(MaskError, match="the device returned a wrong product"):
        layer.unmask(sent, layer.device(sent) + np.uint64(1), mask)


def test_pad_is_used_once() -> None:
    layer = MaskedLinear(np.eye(3))
    mask = layer.draw(1)
    layer.mask(np.ones((1, 3)), mask)
    with pytest.raises(MaskError, match="this pad was used before"):
        layer.mask(np.zeros((1, 3)), mask)


@both
def test_numbers_come_back_and_too_large_ones_are_refused(domain: str) -> None:
    x = np.array([-3.5, 0.0, 2.25])
    assert (
        decode(encode(x, fraction_bits=4, domain=domain), fraction_bits=4, domain=domain).tolist()
        == x.tolist()
    )
    for bad in (np.inf, np.nan, 1e18):
        with pytest.raises(MaskError, match="a number does not fit"):
            encode(np.array([bad]), fraction_bits=4, domain=domain)


def test_uniform_draws_lie_in_the_field() -> None:
    drawn = uniform((5000,), domain="prime")
    assert drawn.max() < PRIME
    assert len(set(drawn.tolist())) > 4900


def test_wrong_values() -> None:
    with pytest.raises(
        ValueError, match="num_checks.* leaves a wrong product undetected too often; take .*40"
    ):
        freivalds(*(np.ones((1, 1), np.uint64),) * 3, domain="ring", num_checks=3)
    with pytest.raises(ValueError, match="domain must be 'ring'"):
        encode(np.ones(1), fraction_bits=1, domain="real")
    with pytest.raises(MaskError, match="its results cannot be used"):
        raise_wrong_scores()


def raise_wrong_scores() -> None:
    from unittest import mock

    from hf_plugins.tee_split import masking

    with mock.patch.object(masking, "freivalds", return_value=False):
        masked_scores(np.ones((1, 1), np.uint64), np.ones((1, 1), np.uint64), domain="ring")
