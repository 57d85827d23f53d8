"""Bootstrap of the plan over steps."""

import pytest
import torch

from hf_plugins.gradpruner.plan import plan_pruning
from hf_plugins.gradpruner.stability import plan_stability


def planner(scores: torch.Tensor) -> tuple[int, ...]:
    return plan_pruning(scores, n_prune=1, protect=(), n_merge=0).dropped


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_clear_scores_give_one_plan() -> None:
    """Constant scores: layer 1 always goes, nothing varies."""
    found = plan_stability(
        torch.tensor([[3.0, 1.0, 2.0]] * 6, dtype=torch.float64), planner, generator=seeded()
    )
    assert found.drop_frequency == [0.0, 1.0, 0.0]
    assert found.variation == [0.0, 0.0, 0.0]
    assert found.halves_agree


def test_halves_that_disagree_are_told() -> None:
    """First half says layer 0, second half layer 1. Over all, the means are equal and layer 1 goes on ties;
    a sample has more of one half than of the other in most draws, so both frequencies lie well inside (0,
    1)."""
    scores = torch.tensor([[1.0, 2.0]] * 4 + [[2.0, 1.0]] * 4, dtype=torch.float64)
    found = plan_stability(scores, planner, generator=seeded())
    assert not found.halves_agree
    assert 0.2 < found.drop_frequency[0] < 0.8
    assert sum(found.drop_frequency) == pytest.approx(1.0)
    # Standard deviation of four 1 and four 2 is sqrt(2 / 7), their mean 1.5.
    assert found.variation[0] == pytest.approx((2 / 7) ** 0.5 / 1.5)


def test_few_steps_say_nothing_about_halves() -> None:
    scores = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    assert plan_stability(scores, planner, generator=seeded()).halves_agree
    assert plan_stability(scores[:1], planner, generator=seeded()).variation == [0.0, 0.0]
