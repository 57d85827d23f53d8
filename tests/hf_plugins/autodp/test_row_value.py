import math

import numpy as np
import pytest
import torch

from hf_plugins.autodp.row_value import adam_direction, deita_select, jl_project, keep_best, less_scores
from tests.hf_plugins.autodp import reference


def gradients(n: int, p: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, p, generator=torch.Generator().manual_seed(seed))


def test_adam_direction_by_hand() -> None:
    """g = 2, m = 1, v = 4: m' = .9 + .2 = 1.1, v' = .999 * 4 + .001 * 4 = 4, so 1.1 / (2 + eps)."""
    found = adam_direction(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([4.0]), eps=0.5)
    assert found.item() == pytest.approx(1.1 / 2.5)


def test_sgd_without_projection_ranks_like_the_cosine() -> None:
    train, val = [gradients(30, 50, s) for s in (0, 1)], [gradients(7, 50, s) for s in (2, 3)]
    found = less_scores(train, val, [2e-5, 1e-5])
    expected = reference.less(
        [t.double().numpy() for t in train], [v.double().numpy() for v in val], [2e-5, 1e-5]
    )
    assert found.numpy() == pytest.approx(expected, abs=1e-6)
    assert found.argsort().tolist() == expected.argsort().tolist()


def test_each_checkpoints_rate_counts() -> None:
    """Regression, defect 10: the release used the last checkpoint for all, so the rates had no effect."""
    train, val = [gradients(10, 20, s) for s in (0, 1)], [gradients(3, 20, s) for s in (2, 3)]
    assert not torch.allclose(less_scores(train, val, [1.0, 3.0]), less_scores(train, val, [3.0, 1.0]))


def test_length_of_a_gradient_does_not_count() -> None:
    train, val = gradients(6, 9), gradients(2, 9, 1)
    scaled = train * torch.tensor([1.0, 10, 100, 0.1, 1, 1])[:, None]
    assert less_scores([scaled], [val], [1.0]).tolist() == pytest.approx(
        less_scores([train], [val], [1.0]).tolist(), abs=1e-6
    )


def test_largest_of_the_sub_tasks() -> None:
    train, val = torch.eye(3), torch.eye(3)[:2]
    assert less_scores([train], [val], [1.0]).tolist() == pytest.approx([0.5, 0.5, 0])
    assert less_scores([train], [val], [1.0], tasks=torch.tensor([0, 1])).tolist() == [1, 1, 0]
    with pytest.raises(ValueError, match="a rate for each checkpoint"):
        less_scores([train], [val], [])


def test_projection_keeps_inner_products() -> None:
    """Within 4 / sqrt(k) of the norms: 4 standard errors of a sum of k signs; 400 pairs at k = 1024."""
    x = gradients(20, 3000)
    y = jl_project(x, 1024, seed=0)
    exact, kept = x @ x.T, y @ y.T
    norms = x.norm(dim=1)[:, None] * x.norm(dim=1)
    assert ((exact - kept).abs() / norms).max() < 4 / math.sqrt(1024)
    assert torch.equal(jl_project(x, 64, seed=1), jl_project(x, 64, seed=1))
    assert not torch.equal(jl_project(x, 64, seed=1), jl_project(x, 64, seed=2))


def test_blocks_of_the_projection_differ() -> None:
    x = torch.zeros(2, 8192)
    x[0, 0] = x[1, 4096] = 1
    a, b = jl_project(x, 256, seed=0)
    assert abs(float(a @ b)) < 0.5


def test_a_copy_of_a_validation_row_ranks_on_top() -> None:
    """1 of 300 training rows is the validation gradient itself: in the top 1 % also after projection."""
    train, val = gradients(300, 2000), gradients(1, 2000, 9)
    train[123] = 3 * val[0]
    scores = less_scores([jl_project(train, 512, seed=0)], [jl_project(val, 512, seed=0)], [1.0])
    assert 123 in scores.topk(3).indices.tolist()


def test_scores_are_numbers_when_the_best_are_kept() -> None:
    """Regression, defect 14: scores were strings in the release, and "9" > "10"."""
    assert keep_best([9, 10, 8, 10], 0.5).tolist() == [1, 3]
    assert keep_best([1, 1, 1], 0.34).tolist() == [0]
    assert len(keep_best([3.0] * 7, 0.5)) == 4


def test_deita_is_greedy_and_diverse() -> None:
    """Products 6, 6, 5, 1; row 1 is row 0 again (cosine 1), so rows 0, 2, 3."""
    x = np.array([[1.0, 0], [2, 0], [0, 1], [1, 1]])
    assert deita_select([3, 2, 5, 1], [2, 3, 1, 1], x, 3).tolist() == [0, 2, 3]
    assert deita_select([3, 2, 5, 1], [2, 3, 1, 1], x, 2).tolist() == [0, 2]
    assert deita_select([1, 1], [1, 1], np.zeros((2, 2)), 2).tolist() == [0, 1]
