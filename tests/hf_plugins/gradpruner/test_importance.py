"""Simulated gradients, Gram scores, layer scores."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_plugins.gradpruner.importance import (
    importance_rows,
    layer_scores,
    simulated_gradient,
    squared_norm,
    step_scores,
)
from tests.hf_plugins.gradpruner import reference


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_gram_score_is_the_dense_one(m: int, n: int, r: int, seed: int) -> None:
    """Acceptance fact 2 in fp64: rounding of sums of at most 81 terms stays below 1e-12."""
    left, right = normal(m, r, seed=seed), normal(r, n, seed=seed + 1)
    dense = (left @ right).square().sum()
    torch.testing.assert_close(squared_norm(left, right), dense, rtol=1e-12, atol=1e-12)


def test_gram_score_in_fp32() -> None:
    """Acceptance fact 2 in fp32, at the size of a real projection."""
    left, right = normal(1536, 8, dtype=torch.float32), normal(8, 384, seed=1, dtype=torch.float32)
    dense = (left.double() @ right.double()).square().sum()
    torch.testing.assert_close(squared_norm(left, right), dense, rtol=1e-4, atol=0)


def test_product_by_hand() -> None:
    """g_B = [1, 2]^T and g_A = [3, 4]: the product is [[3, 4], [6, 8]], squares sum to 9 + 16 + 36 + 64 =
    125."""
    a, b = torch.zeros(1, 2), torch.zeros(2, 1)
    left, right = simulated_gradient(a, b, torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [2.0]]))
    assert squared_norm(left, right) == 125.0


def test_first_order_is_the_change_of_b_a() -> None:
    """B A - (B - g_B)(A - g_A) = g_B A + B g_A - g_B g_A: what one SGD step of rate 1 takes from B A."""
    a, b, grad_a, grad_b = (normal(2, 5), normal(4, 2, seed=1), normal(2, 5, seed=2), normal(4, 2, seed=3))
    left, right = simulated_gradient(a, b, grad_a, grad_b, estimator="first_order")
    want = b @ a - (b - grad_b) @ (a - grad_a)
    torch.testing.assert_close((left @ right).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("estimator", ["product", "exact"])
def test_other_estimators_hand_the_gradients_on(estimator: str) -> None:
    a, b, grad_a, grad_b = (normal(2, 5), normal(4, 2, seed=1), normal(2, 5, seed=2), normal(4, 2, seed=3))
    left, right = simulated_gradient(a, b, grad_a, grad_b, estimator=estimator)  # type: ignore[arg-type]
    assert left.dtype == right.dtype == torch.float32
    torch.testing.assert_close(left @ right, (grad_b @ grad_a).float(), rtol=1e-5, atol=1e-6)


def test_factors_do_not_share_memory_with_gradients() -> None:
    """zero_grad() after the step must not empty the history."""
    grad_a, grad_b = torch.ones(1, 3), torch.ones(2, 1)
    left, right = simulated_gradient(torch.zeros(1, 3), torch.zeros(2, 1), grad_a, grad_b)
    grad_a.zero_()
    grad_b.zero_()
    assert left.sum() == 2
    assert right.sum() == 3


def test_importance_rows_agree_with_loops() -> None:
    lefts, rights = normal(3, 4, 2, dtype=torch.float32), normal(3, 2, 5, seed=1, dtype=torch.float32)
    want = reference.importance_matrix(list(rights), list(lefts))
    got = torch.cat([importance_rows(lefts, rights, 0, 1), importance_rows(lefts, rights, 1, 4)])
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    score = sum(float(squared_norm(x, y)) for x, y in zip(lefts, rights, strict=True)) / 3
    assert score == pytest.approx(reference.layer_importance(list(rights), list(lefts)), rel=1e-5)
    assert score == pytest.approx(float(got.sum()), rel=1e-5)


NORMS = [{(0, "q"): 4.0, (0, "v"): 9.0, (2, "q"): 16.0}, {(0, "q"): 0.0, (0, "v"): 1.0, (2, "q"): 4.0}]


def test_step_and_layer_scores_by_hand() -> None:
    """squared: layer 0 is 13 and 1, mean 7; layer 2 is 16 and 4, mean 10. fro: 2 + 3 and 1, mean 3; 4 and 2,
    mean 3."""
    assert layer_scores(step_scores(NORMS, 3)).tolist() == [7.0, 0.0, 10.0]
    assert layer_scores(step_scores(NORMS, 3, score="fro")).tolist() == [3.0, 0.0, 3.0]


def test_normalised_by_size() -> None:
    sizes = {(0, "q"): 3, (0, "v"): 4, (2, "q"): 5}
    assert layer_scores(step_scores(NORMS, 3, normalize="params", num_params=sizes)).tolist() == [
        1.0,
        0.0,
        2.0,
    ]
    with pytest.raises(ValueError, match="needs the size of each module"):
        step_scores(NORMS, 3, normalize="params")


def test_order_of_modules_does_not_matter() -> None:
    """Acceptance fact 14: bit-equal under another order of the dict."""
    # Ten ones are lost when they come after 1e16 and count when they come before it.
    values = {(0, f"m{i}"): 1.0 for i in range(10)} | {(0, "z"): 1e16}
    turned = dict(reversed(values.items()))
    assert torch.equal(step_scores([values], 1), step_scores([turned], 1))


def test_useless_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="no step was collected"):
        layer_scores(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="LoRA starts with B = 0"):
        layer_scores(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="layer scores hold inf or NaN"):
        layer_scores(torch.tensor([[1.0, float("nan")]]))
