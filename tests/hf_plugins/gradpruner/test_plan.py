"""Which layers go and where they are merged."""

import json

import pytest
import torch

from hf_plugins.gradpruner.plan import PruningPlan, check_plan, orphans, plan_pruning

SCORES = [9.0, 3.0, 1.0, 2.0, 8.0, 7.0, 6.0, 5.0]


def test_lowest_go_and_the_highest_of_them_are_merged() -> None:
    """Lowest of the unprotected: 2 (1.0), 3 (2.0), 1 (3.0). Highest of these: 1, then 3. Both go into layer
    0."""
    plan = plan_pruning(SCORES, n_prune=3, n_merge=2)
    assert plan.dropped == (1, 2, 3)
    assert plan.merged == ((1, 0), (3, 0))
    assert plan.kept == (0, 4, 5, 6, 7)
    assert plan.receivers == {0: (1, 3)}


def test_papers_counts() -> None:
    """32 layers: 13 go, and the 3 beyond 10 are merged; with the paper's layers 18..30 all go into 17."""
    scores = torch.cat(
        [
            torch.arange(100.0, 118.0),
            torch.tensor([3.0, 2.9]),
            torch.arange(1.0, 2.0, 0.1),
            torch.tensor([2.8]),
            torch.tensor([99.0]),
        ]
    )
    plan = plan_pruning(scores, ratio=0.4)
    assert plan.dropped == tuple(range(18, 31))
    assert plan.merged == ((18, 17), (19, 17), (30, 17))
    assert plan_pruning(scores) == plan


@pytest.mark.parametrize(("n_merge", "count"), [(0, 0), (2, 2), ("3", 3), ("all", 4), (None, 2)])
def test_how_many_are_merged(n_merge: int | str | None, count: int) -> None:
    """None: 4 of 8 go, 10/32 of 8 is 2, so 2 are merged."""
    assert len(plan_pruning(SCORES, n_prune=4, n_merge=n_merge).merged) == count


def test_ties_take_the_later_layer_first() -> None:
    assert plan_pruning([1.0] * 6, n_prune=2, n_merge=0).dropped == (3, 4)
    assert plan_pruning([1.0] * 6, n_prune=2, n_merge=0, protect=()).dropped == (4, 5)


def test_protection_counts_from_the_end_too() -> None:
    assert plan_pruning(SCORES, n_prune=2, protect=(2, -5)).dropped == (1, 7)
    with pytest.raises(ValueError, match="protect names layers"):
        plan_pruning(SCORES, n_prune=1, protect=(8,))


def test_first_layer_has_no_receiver() -> None:
    """Layer 0 is the lowest: it is dropped without merging, and told."""
    plan = plan_pruning([0.0, 5.0, 1.0, 6.0], n_prune=2, n_merge="all", protect=())
    assert plan.dropped == (0, 2)
    assert plan.merged == ((2, 1),)
    assert orphans(plan) == [0]
    assert orphans(plan_pruning(SCORES, n_prune=3)) == []


def test_listed_layers() -> None:
    plan = plan_pruning(SCORES, layers=[4, 5], n_merge=1)
    assert plan.dropped == (4, 5)
    assert plan.merged == ((4, 3),)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_prune": 8}, "8 of 8 layers shall go, but only 0 to 6 can"),
        ({"n_prune": 7}, "7 of 8 layers shall go"),
        ({"n_prune": -1}, "layers shall go, but only 0 to"),
        ({"n_prune": 8, "protect": ()}, "but only 0 to 7 can"),
        ({"n_prune": 2, "n_merge": 3}, "n_merge=3 of 2 dropped layers"),
        ({"n_prune": 2, "n_merge": -1}, "dropped layers cannot be merged"),
        ({"n_prune": 2, "ratio": 0.5}, "exclude each other; give one"),
        ({"layers": [0, 3]}, "listed to go and protected"),
        ({"layers": [9]}, "this model has layers 0 to 7"),
        ({"layers": range(8)}, "cannot all go"),
    ],
)
def test_bad_counts(options: dict, message: str) -> None:
    """Acceptance fact 12, the part about counts."""
    with pytest.raises(ValueError, match=message):
        plan_pruning(SCORES, **options)


def test_scores_must_be_finite() -> None:
    with pytest.raises(ValueError, match="are not finite; nothing is planned on them"):
        plan_pruning([1.0, float("nan"), 2.0], n_prune=1)


def test_json_round_trip() -> None:
    plan = plan_pruning(SCORES, n_prune=3, n_merge=2)
    assert PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize(
    "change", [{"dropped": [9]}, {"dropped": list(range(8))}, {"merged": [[0, 1]]}, {"merged": [[2, 3]]}]
)
def test_foreign_plans_are_refused(change: dict) -> None:
    values = plan_pruning(SCORES, n_prune=3, n_merge=2).to_dict() | change
    with pytest.raises(ValueError, match="not a pruning plan"):
        PruningPlan.from_dict(values)


def test_plan_must_fit_the_model() -> None:
    plan = plan_pruning(SCORES, n_prune=3, n_merge=2)
    check_plan(plan, 8, has_history=True)
    with pytest.raises(ValueError, match="score this very model first"):
        check_plan(plan, 6, has_history=True)
    with pytest.raises(ValueError, match="needs their gradient factors"):
        check_plan(plan, 8, has_history=False)
