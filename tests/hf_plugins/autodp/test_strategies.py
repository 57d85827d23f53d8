import random

import pytest

from hf_plugins.autodp.strategies import (
    IDENTITY,
    TEAMS,
    Space,
    Step,
    StepSpec,
    cost_model,
    strategy_json,
    strategy_key,
    team_runs,
)
from tests.hf_plugins.autodp.reference import every_strategy

SPACE = Space()
OPS = Space(
    (
        StepSpec(name="length", ability="x", choices={"low": (20, 10), "high": (100,)}),
        StepSpec(name="dedup", ability="y"),
    )
)


def test_space_has_64_ordered_strategies() -> None:
    """4 + 4*3 + 4*3*2 + 4*3*2*1 = 4 + 12 + 24 + 24 = 64."""
    found = SPACE.all()
    assert [tuple(step.name for step in s) for s in found] == every_strategy(SPACE.names)
    assert len(set(found)) == 64


def test_all_64_cost_196_steps_or_64_with_prefixes() -> None:
    """Alone: 4*1 + 12*2 + 24*3 + 24*4 = 196. Every strategy is a prefix of itself, and prefixes are
    strategies: 64.
    """
    assert team_runs(SPACE.all()) == (196, 64)


def test_mean_reuse_of_random_subsets() -> None:
    """The dossier's expected factors for 8, 16, 24 random strategies: 1.34, 1.64, 1.90 (ratio of means, 400
    draws have a standard error below .01)."""
    generator = random.Random(0)
    for count, expected in ((8, 1.34), (16, 1.64), (24, 1.90)):
        runs = [team_runs(generator.sample(SPACE.all(), count)) for _ in range(400)]
        assert sum(a for a, _ in runs) / sum(b for _, b in runs) == pytest.approx(expected, abs=0.04)


def test_names_in_both_languages_and_spelling() -> None:
    strategy = SPACE.strategy(["数据清洗团队", " Select "])
    assert strategy_key(strategy) == "clean>select"
    assert strategy_key(IDENTITY) == "identity"
    assert strategy_json(strategy) == ["clean", "select"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["clean", "clean"], "no step may stand twice"),
        ([], "a strategy has 1 to .*steps; got 0"),
        (["claen"], "unknown step .*; the space has .*Did you mean 'clean'"),
        ([{"name": 3}], "a step is a name or"),
        ([{"name": "clean", "params": {"x": 1}}], " has no parameter .*; it has none"),
    ],
)
def test_wrong_strategies(entries: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SPACE.strategy(entries)


def test_parameters_are_bounded_and_take_defaults() -> None:
    assert OPS.step("length") == Step("length", (("high", 100), ("low", 20)))
    assert (
        strategy_key(OPS.strategy([{"name": "length", "params": {"low": 10}}]))
        == 'length{"high":100,"low":10}'
    )
    with pytest.raises(ValueError, match="must be one of"):
        OPS.step({"name": "length", "params": {"low": 11}})


def test_children_and_draws_stay_in_the_space() -> None:
    assert len(SPACE.children(IDENTITY)) == 4
    assert len(OPS.children(IDENTITY)) == 3
    assert SPACE.children(SPACE.strategy(["clean", "generate", "optimize", "select"])) == []
    drawn = {SPACE.draw(random.Random(seed)) for seed in range(1500)}
    assert drawn == set(SPACE.all())
    assert {len(OPS.draw(random.Random(seed))) for seed in range(30)} == {1, 2}


def test_the_draw_is_uniform() -> None:
    """Over 64 strategies one has length 1 with probability 4/64; 3,000 draws have a standard error of
    .0044.
    """
    generator = random.Random(1)
    share = sum(len(SPACE.draw(generator)) == 1 for _ in range(3000)) / 3000
    assert share == pytest.approx(4 / 64, abs=0.022)


def test_cost_model_by_hand() -> None:
    """ops 100, train 50, gen 20, judge 20, agent 10: rest 50. PTS saves the clean four fifths of
    the half that OPTIMIZE takes: 60 of ops are left.
    """
    times = {"ops": 100.0, "train": 50.0, "gen": 20.0, "judge": 20.0, "agent": 10.0}
    found = cost_model(times, ratio=0.2, dirty_share=0.2, optimize_share=0.5, reuse=2.0)
    assert found == pytest.approx(
        {"nothing": 200, "dps": 80, "pts": 160, "cache": 150, "all": 0.2 * (30 + 50) + 50, "floor": 50}
    )


def test_team_names_are_the_published_ones() -> None:
    assert [spec.name_zh for spec in TEAMS] == [
        "数据清洗团队",
        "数据生成团队",
        "数据优化团队",
        "数据挑选团队",
    ]
