"""LUS: the golden, ties, scopes, counts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_plugins.dp_fedavg import clip_update, sparsify_update
from hf_plugins.dp_fedavg.sparsification import keep_mask, kept_norms, largest, utility_cost
from tests.hf_plugins.dp_fedavg import reference

DELTA = torch.tensor([1.680163, 2.240217, 0.280027, -0.140014])
GRADIENT = DELTA - torch.tensor([3.0, 4.0, 0.5, -0.25])


def test_golden_after_ten_steps() -> None:
    """T = |g delta|; keep 0.5 keeps the first two; clipped to S = 1: [0.6, 0.8, 0, 0]."""
    golden = torch.tensor([2.217541, 3.942296, 0.061598, 0.015400])
    torch.testing.assert_close(utility_cost(DELTA, GRADIENT), golden, atol=2e-6, rtol=0)
    sparse = sparsify_update(DELTA, GRADIENT, keep_ratio=0.5)
    assert (sparse != 0).tolist() == [True, True, False, False]
    clipped = clip_update([sparse], 1.0)[0][0]
    torch.testing.assert_close(clipped, torch.tensor([0.6, 0.8, 0.0, 0.0]), atol=1e-5, rtol=0)


def test_ties_go_to_the_lowest_index() -> None:
    assert largest(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3).tolist() == [True, True, False, True, False]
    assert largest(torch.zeros(4), 2).tolist() == [True, True, False, False]
    assert largest(torch.ones(3), 0).tolist() == [False] * 3


@settings(deadline=None, derandomize=True, max_examples=80)
@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=12),
    keep=st.sampled_from([0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]),
)
def test_against_reference(values: list[int], keep: float) -> None:
    delta = torch.tensor(values, dtype=torch.float32)
    gradient = torch.linspace(-1, 1, len(values))
    expected = reference.lus_mask(delta.tolist(), gradient.tolist(), keep)
    mask = keep_mask(utility_cost(delta, gradient), keep)
    assert mask.int().tolist() == expected
    assert int(mask.sum()) == math.ceil(keep * len(values) - 1e-9)


def test_scopes() -> None:
    """Tensors [9, 8, 7, 6] and [1, 2]: half of each keeps 9, 8 and 2; half of all keeps 9, 8, 7."""
    delta = torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 2.0])
    ones = torch.ones(6)
    each = sparsify_update(delta, ones, keep_ratio=0.5, sizes=[4, 2])
    assert each.tolist() == [9, 8, 0, 0, 0, 2]
    whole = sparsify_update(delta, ones, keep_ratio=0.5, sizes=[4, 2], scope="global")
    assert whole.tolist() == [9, 8, 7, 0, 0, 0]


def test_keep_all_is_the_identity_and_nothing_is_rescaled() -> None:
    assert torch.equal(sparsify_update(DELTA, GRADIENT, keep_ratio=1.0), DELTA)
    sparse = sparsify_update(DELTA, GRADIENT, keep_ratio=0.3)
    assert all(float(s) in (0.0, float(d)) for s, d in zip(sparse, DELTA, strict=True))


def test_controls() -> None:
    delta = torch.tensor([1.0, -3.0, 2.0, 0.5])
    assert sparsify_update(delta, keep_ratio=0.5, score="magnitude").tolist() == [0, -3, 2, 0]
    draws = [
        sparsify_update(
            torch.ones(40), keep_ratio=0.5, score="random", generator=torch.Generator().manual_seed(seed)
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert all(int(d.sum()) == 20 for d in draws)


def test_utility_differs_from_magnitude() -> None:
    """A large coordinate that the loss no longer cares for goes first."""
    delta, gradient = torch.tensor([10.0, 1.0]), torch.tensor([0.0, 1.0])
    assert sparsify_update(delta, gradient, keep_ratio=0.5).tolist() == [0, 1]
    assert sparsify_update(delta, keep_ratio=0.5, score="magnitude").tolist() == [10, 0]


def test_refusals() -> None:
    for keep in (0.0, 1.1, -0.1):
        with pytest.raises(ValueError, match="keep_ratio must lie in "):
            sparsify_update(DELTA, GRADIENT, keep_ratio=keep)
    with pytest.raises(ValueError, match="sizes must add up to the update"):
        sparsify_update(DELTA, GRADIENT, keep_ratio=0.5, sizes=[3])
    with pytest.raises(ValueError, match="Train with keep_gradient='last' or 'full'"):
        sparsify_update(DELTA, keep_ratio=0.5)
    with pytest.raises(ValueError, match="the gradient for LUS is not finite"):
        sparsify_update(DELTA, GRADIENT * math.nan, keep_ratio=0.5)
    with pytest.raises(ValueError, match="score must be utility, magnitude or random"):
        sparsify_update(DELTA, keep_ratio=0.5, score="fisher")
    with pytest.raises(ValueError, match="scope must be tensor or global"):
        sparsify_update(DELTA, GRADIENT, keep_ratio=0.5, scope="layer")


def test_kept_norms_of_each_tensor() -> None:
    """[3, 4 | 0, 1 | 0] keeps 4 and nothing and nothing: 16/25, 0, and 1 where nothing was to lose."""
    update = torch.tensor([3.0, 4.0, 0.0, 1.0, 0.0])
    sparse = torch.tensor([0.0, 4.0, 0.0, 0.0, 0.0])
    assert kept_norms(update, sparse, [2, 2, 1]) == [16 / 25, 0.0, 1.0]
