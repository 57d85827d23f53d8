"""Clipping against hand values and loops; the bound is the bound."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_plugins.dp.clipping import (
    bias_norms,
    clip_factors,
    clipped_sum,
    embedding_gradients,
    embedding_norms,
    linear_norms,
    unit_means,
    unit_norms,
)

shapes = st.tuples(
    st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99)
)


def test_norm_is_over_all_parameters_together() -> None:
    """Gradients (3, 4) and 12 of one unit: sqrt(9 + 16 + 144) = 13."""
    norms = unit_norms([torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[12.0], [1.0]])])
    torch.testing.assert_close(norms, torch.tensor([13.0, 1.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="nothing can be clipped"):
        unit_norms([])


def test_factor_by_hand() -> None:
    """Norms 0, 1/2, 1, 4 at C = 1: untouched up to the bound, then 1/4 (less 1e-5 for rounding)."""
    factors = clip_factors(torch.tensor([0.0, 0.5, 1.0, 4.0, math.inf, math.nan]), 1.0)
    assert factors[:3].tolist() == [1, 1, 1]
    assert factors[3] == pytest.approx(0.25, rel=2e-5)
    assert factors[3] < 0.25
    assert factors[4:].tolist() == [0, 0]


@settings(derandomize=True, deadline=None, max_examples=40)
@given(scale=st.floats(1e-3, 1e8), seed=st.integers(0, 99), bound=st.floats(1e-3, 1e3))
def test_no_unit_moves_the_sum_by_more_than_the_bound(scale: float, seed: int, bound: float) -> None:
    """The sum with and without one unit differs by at most C, whatever its gradient holds."""
    generator = torch.Generator().manual_seed(seed)
    gradients = [scale * torch.randn(3, *shape, generator=generator) for shape in ((5, 2), (7,), ())]
    gradients[0][1, 0, 0] *= 1e4
    factors = clip_factors(unit_norms([g.view(3, -1) for g in gradients]), bound)
    for unit in range(3):
        others = torch.tensor([i for i in range(3) if i != unit])
        moved = sum(
            float(
                (clipped_sum(g, factors).double() - clipped_sum(g[others], factors[others]).double())
                .square()
                .sum()
            )
            for g in gradients
        )
        # The two sums are float32 themselves: their rounding scales with the bound.
        assert math.sqrt(moved) <= bound * (1 + 1e-6)


def test_unit_that_is_not_finite_counts_as_nothing() -> None:
    gradients = torch.tensor([[1.0, 0.0], [math.nan, 1.0], [math.inf, 0.0]])
    factors = clip_factors(unit_norms([gradients]), 10.0)
    assert clipped_sum(gradients, factors).tolist() == [1.0, 0.0]


def test_users_gradients_are_averaged() -> None:
    """User 0 has records 2 and 4 (mean 3), user 1 has record 10."""
    means = unit_means(torch.tensor([[2.0], [10.0], [4.0]]), torch.tensor([0, 1, 0]), 2)
    assert means.tolist() == [[3.0], [10.0]]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(shapes)
def test_linear_norms_equal_built_gradients(shape: tuple[int, int, int, int, int]) -> None:
    """Both sides of the identity, on either side of the choice by cost, with an extra axis."""
    batch, tokens, wide_in, wide_out, seed = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, 2, wide_in, generator=generator)
    g = torch.randn(batch, tokens, 2, wide_out, generator=generator)
    built = torch.einsum("btui,btuo->boi", x, g).flatten(1).norm(dim=1)
    torch.testing.assert_close(linear_norms(x, g), built, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias_norms(g), g.sum((1, 2)).norm(dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tokens", "wide"), [(2, 64), (64, 2)])
def test_linear_norms_on_both_sides_of_the_choice(tokens: int, wide: int) -> None:
    """T (I + O) < I O takes products of positions (2 * 128 < 4096), else gradients are built (64 * 4 > 4)."""
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(3, tokens, wide, generator=generator) for _ in range(2))
    built = torch.einsum("bti,bto->boi", x, g).flatten(1).norm(dim=1)
    torch.testing.assert_close(linear_norms(x, g), built, rtol=1e-5, atol=1e-5)


def test_two_axes_are_one_position() -> None:
    """x = (3, 4), g = 2: the gradient is their outer product, norm 5 * 2."""
    assert linear_norms(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0]])).tolist() == [10.0]


@settings(derandomize=True, deadline=None, max_examples=30)
@given(shapes, st.booleans())
def test_embedding_norms_equal_built_tables(shape: tuple[int, int, int, int, int], pad: bool) -> None:
    """Repeated tokens add up before they are squared; autograd is the judge of both."""
    batch, tokens, width, rows, seed = shape
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, rows, (batch, tokens), generator=generator)
    g = torch.randn(batch, tokens, width, generator=generator)
    padding = 0 if pad else None
    table = embedding_gradients(index, g, rows=rows, padding_idx=padding)
    for record in range(batch):
        layer = torch.nn.Embedding(rows, width, padding_idx=padding)
        (layer(index[record]) * g[record]).sum().backward()
        torch.testing.assert_close(table[record], layer.weight.grad)
    norms = embedding_norms(index, g, rows=rows, padding_idx=padding)
    torch.testing.assert_close(norms, table.flatten(1).norm(dim=1), rtol=1e-5, atol=1e-6)
