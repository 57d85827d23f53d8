"""Scores of the baselines and LaCo's search."""

import pytest
import torch

from hf_plugins.gradpruner.baselines import (
    Groups,
    block_influence,
    laco_groups,
    laco_plan,
    magnitude,
    random_order,
    reverse_order,
)
from hf_plugins.gradpruner.plan import plan_pruning


def test_reverse_drops_the_last() -> None:
    assert plan_pruning(reverse_order(6), n_prune=3, protect=()).dropped == (3, 4, 5)


def test_random_is_seeded() -> None:
    a, b, c = (random_order(30, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert sorted(a.tolist()) == list(range(30))


def test_block_influence_is_one_minus_cosine() -> None:
    assert block_influence([0.25, 1.0, -1.0]).tolist() == [0.75, 0.0, 2.0]


def test_magnitude_sums_absolute_values() -> None:
    assert magnitude([[torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0]])], []]).tolist() == [6.0, 0.0]


def test_laco_accepts_from_the_top_down() -> None:
    """Every window is similar enough: receivers 4 and 2 take the layer behind each (5 of 6 is protected)."""
    assert list(laco_groups(6, 2, lambda groups: 1.0)) == [(3, (4,)), (1, (2,))]
    assert list(laco_groups(6, 2, lambda groups: 1.0, protect=())) == [(4, (5,)), (2, (3,))]


def test_laco_passes_over_windows_that_change_the_output() -> None:
    """Collapsing 4 hurts (0.5), collapsing 3 does not: the window moves down by one and takes 3 into 2."""

    def similarity(groups: Groups) -> float:
        return 0.5 if any(4 in donors for _, donors in groups) else 1.0

    assert list(laco_groups(6, 1, similarity)) == [(2, (3,))]


def test_laco_lowers_the_threshold_until_enough_go() -> None:
    asked = []

    def similarity(groups: Groups) -> float:
        asked.append(groups)
        return 0.7

    assert sum(len(donors) for _, donors in laco_groups(6, 2, similarity)) == 2
    # Nothing is accepted at .95 .. .70, five thresholds or more, before .65 lets windows through.
    assert len(asked) > 2


def test_laco_takes_larger_windows_for_many_layers() -> None:
    groups = laco_groups(6, 4, lambda groups: 1.0)
    assert sorted(donor for _, donors in groups for donor in donors) == [1, 2, 3, 4]


def test_laco_bounds() -> None:
    assert laco_groups(6, 0, lambda groups: 1.0) == []
    with pytest.raises(ValueError, match="LaCo cannot collapse .*protected; lower n_prune"):
        laco_groups(6, 5, lambda groups: 1.0)


def test_laco_plan_merges_all_by_difference() -> None:
    plan = laco_plan(6, [(3, (4, 5)), (0, (1,))])
    assert plan.dropped == (1, 4, 5)
    assert plan.merged == ((1, 0), (4, 3), (5, 3))
    assert (plan.rule, plan.method) == ("difference", "laco")
