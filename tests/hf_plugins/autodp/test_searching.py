import json
import random

import pytest

from hf_plugins.autodp.searching import (
    AgentSearch,
    HalvingSearch,
    HybridSearch,
    ListSearch,
    MCTSSearch,
    Scored,
    Search,
    Trial,
    best_of,
    exhaustive,
    halving_cost,
    make_search,
    random_search,
)
from hf_plugins.autodp.strategies import IDENTITY, Space, StepSpec, Strategy, strategy_key

SPACE = Space()


def landscape(strategy: Strategy) -> float:
    """A table with one best entry: clean before select, nothing else."""
    names = [step.name for step in strategy]
    value = 0.2 * ("clean" in names) + 0.1 * ("select" in names) - 0.05 * len(names)
    if "clean" in names and "select" in names:
        value += 0.1 if names.index("clean") < names.index("select") else -0.1
    return value - 0.2 * ("generate" in names)


def play(search: Search, noise: float = 0.0, seed: int = 0) -> list[Trial]:
    generator = random.Random(seed)
    ran = []
    while trials := search.ask():
        ran += trials
        scores = [landscape(trial.strategy) + generator.gauss(0, noise) for trial in trials]
        search.tell([Scored(trial, score, score - 0.01) for trial, score in zip(trials, scores, strict=True)])
    return ran


def script(*replies: object) -> tuple[list[list[dict]], object]:
    """A chat that says these, and the messages it was sent."""
    waiting, seen = list(replies), []

    def chat(messages: list[dict[str, str]]) -> str:
        seen.append(messages)
        reply = waiting.pop(0)
        return reply if isinstance(reply, str) else json.dumps(reply)

    return seen, chat


def propose(*strategies: list[str], **more: object) -> dict:
    return {"strategies": list(strategies), "final": None, "no_processing": False, "reason": ""} | more


OPTIMUM = SPACE.strategy(["clean", "select"])


def test_exhaustive_equals_brute_force() -> None:
    search = exhaustive(SPACE)
    assert len(play(search)) == 64
    assert search.best() == max(SPACE.all(), key=landscape) == OPTIMUM


def test_halving_costs_22_of_64_and_finds_the_optimum() -> None:
    """64/4 + 16 (1/2 - 1/4) + 4 (1 - 1/2) = 16 + 4 + 2 = 22, 34 % of 64."""
    search = HalvingSearch(SPACE.all())
    ran = play(search)
    assert [sum(trial.budget == rung for trial in ran) for rung in (0.25, 0.5, 1.0)] == [64, 16, 4]
    assert halving_cost(64) == 22
    assert 22 / 64 == pytest.approx(0.34, abs=0.005)
    assert search.best() == OPTIMUM
    assert all(trial.keep == (trial.budget < 1) for trial in ran)


def test_halving_picks_an_arm_within_one_error_of_the_best() -> None:
    """Noise of .02 on each score: over 20 seeds the pick loses at most .02 on average."""
    losses = []
    for seed in range(20):
        search = HalvingSearch(SPACE.all())
        play(search, noise=0.02, seed=seed)
        losses.append(landscape(OPTIMUM) - landscape(search.best()))
    assert sum(losses) / len(losses) <= 0.02


def test_random_search_draws_different_strategies() -> None:
    search = random_search(SPACE, 8, seed=3)
    assert len(set(search.strategies)) == 8
    assert (
        search.strategies
        == random_search(SPACE, 8, seed=3).strategies
        != random_search(SPACE, 8, seed=4).strategies
    )
    with pytest.raises(ValueError, match="use search='exhaustive' for all"):
        random_search(SPACE, 65, seed=0)
    small = Space((StepSpec(name="a", ability="", choices={"x": (1, 2)}),))
    assert len(random_search(small, 2, seed=0).strategies) == 2
    with pytest.raises(ValueError, match="ask for fewer"):
        random_search(small, 3, seed=0)


def test_mcts_expands_the_tree_and_turns_to_the_better_branch() -> None:
    search = MCTSSearch(SPACE, 20)
    ran = play(search)
    assert len({trial.strategy for trial in ran}) == len(ran) == 20
    assert [len(trial.strategy) for trial in ran[:4]] == [1, 1, 1, 1]
    assert search.best() == OPTIMUM
    firsts = [trial.strategy[0].name for trial in ran[4:]]
    assert firsts.count("clean") > firsts.count("generate")


def test_mcts_ends_when_the_space_is_used_up() -> None:
    assert len(play(MCTSSearch(SPACE, 1000))) == 64


def test_oracle_agent_finds_the_optimum_in_two_rounds_and_five_evaluations() -> None:
    seen, chat = script(
        propose(["clean"], ["generate"], ["optimize"], ["select"]),
        propose(["clean", "select"]),
        propose(final=["clean", "select"]),
    )
    search = AgentSearch(SPACE, chat)
    assert len(play(search)) == 5
    assert search.best() == OPTIMUM
    assert search.stopped == "final"
    assert len(seen) == 3
    assert "clean" in seen[1][-1]["content"]
    assert f"{landscape(SPACE.strategy(['clean'])):.4f}" in seen[1][-1]["content"]


def test_a_final_strategy_without_a_score_is_scored() -> None:
    _, chat = script(propose(final=["clean", "select"]))
    search = AgentSearch(SPACE, chat)
    assert [trial.strategy for trial in play(search)] == [OPTIMUM]


def test_no_processing_ends_with_the_identity() -> None:
    _, chat = script(propose(["generate"]), propose(no_processing=True))
    search = AgentSearch(SPACE, chat)
    play(search)
    assert search.best() == IDENTITY
    assert search.stopped == "no_processing"


def test_six_rounds_are_the_most() -> None:
    """The release just ends there; here the best scored strategy is taken."""
    names = [["clean"], ["generate"], ["optimize"], ["select"], ["clean", "select"], ["optimize", "clean"]]
    seen, chat = script(*(propose(name) for name in names))
    search = AgentSearch(SPACE, chat)
    assert len(play(search)) == 6
    assert search.stopped == "max_rounds"
    assert search.best() == OPTIMUM
    assert len(seen) == 6


def test_cap_without_a_proof_keeps_the_raw_data() -> None:
    _, chat = script(propose(["generate"]))
    search = AgentSearch(SPACE, chat, max_rounds=1)
    play(search)
    assert search.best() == IDENTITY


def test_a_repeated_strategy_is_not_run_again_and_its_score_is_told() -> None:
    seen, chat = script(propose(["clean"]), propose(["clean"]), propose(final=["clean"]))
    search = AgentSearch(SPACE, chat)
    assert len(play(search)) == 1
    assert f'["clean"]: {landscape(SPACE.strategy(["clean"])):.4f}' in seen[2][-1]["content"]


def test_an_agent_that_only_repeats_itself_ends_at_the_cap() -> None:
    _, chat = script(*[propose(["clean"])] * 6)
    search = AgentSearch(SPACE, chat)
    assert len(play(search)) == 1
    assert search.stopped == "max_rounds"


def test_an_invented_operator_gets_one_repair_turn() -> None:
    seen, chat = script(propose(["exfiltrate"]), propose(["clean"]), propose(final=["clean"]))
    search = AgentSearch(SPACE, chat)
    play(search)
    assert (
        "1 of its steps do not exist; there are clean, generate, optimize, select" in seen[1][-1]["content"]
    )
    assert search.log[0]["repaired"]
    # The failed turn is not part of the history that follows.
    assert len(seen[2]) == 3


@pytest.mark.parametrize("garbage", ["", "no idea", '{"strategies": [["rm -rf"]]}'])
def test_garbage_twice_falls_back_to_what_is_known(garbage: str) -> None:
    _, chat = script(propose(["clean"], ["select"]), garbage, garbage)
    search = AgentSearch(SPACE, chat)
    assert len(play(search)) == 2
    assert search.stopped == "unusable"
    assert search.best() == SPACE.strategy(["clean"])


def test_the_chinese_loop() -> None:
    _, chat = script(
        "**###组合[1]###**\n数据清洗团队，数据挑选团队\n**###不同组合的理由###**\n好",
        "【最佳团队】数据清洗团队,数据挑选团队\n**###不同组合的理由###**\n好",
    )
    search = AgentSearch(SPACE, chat, prompt="paper_zh")
    assert len(play(search)) == 1
    assert search.best() == OPTIMUM


def test_hybrid_lets_the_best_proposals_train_on() -> None:
    _, chat = script(
        propose(["clean"], ["generate"], ["clean", "select"], ["select"]), propose(final=["clean", "select"])
    )
    search = HybridSearch(AgentSearch(SPACE, chat))
    ran = play(search)
    assert [trial.budget for trial in ran] == [0.25] * 4 + [0.5] * 2 + [1.0]
    assert search.best() == OPTIMUM
    _, silent = script("", "")
    assert play(HybridSearch(AgentSearch(SPACE, silent))) == []


def test_best_needs_a_bound_above_zero_at_the_full_budget() -> None:
    clean, select = SPACE.strategy(["clean"]), SPACE.strategy(["select"])
    short = Scored(Trial(select, 0.25), 0.9, 0.8)
    assert best_of([]) == IDENTITY
    assert best_of([short, Scored(Trial(clean), 0.1, -0.01)]) == IDENTITY
    assert best_of([short, Scored(Trial(clean), 0.1, 0.01)]) == clean
    tied = [Scored(Trial(OPTIMUM), 0.1, 0.01), Scored(Trial(clean), 0.1, 0.01)]
    assert best_of(tied) == clean


def test_searches_by_name() -> None:
    _, chat = script(propose(final=["clean"]))
    common = {"count": 4, "seed": 0, "max_rounds": 6, "prompt": "json"}
    for name, kind in (
        ("exhaustive", ListSearch),
        ("random", ListSearch),
        ("halving", HalvingSearch),
        ("mcts", MCTSSearch),
        ("agent", AgentSearch),
        ("hybrid", HybridSearch),
    ):
        assert isinstance(make_search(name, SPACE, chat=chat, **common), kind)
    with pytest.raises(ValueError, match="needs an agent; set agent="):
        make_search("agent", SPACE, chat=None, **common)
    with pytest.raises(ValueError, match="search must be agent, exhaustive"):
        make_search("grid", SPACE, chat=None, **common)


def test_playing_again_with_stored_scores_asks_the_same() -> None:
    for make in (
        lambda: MCTSSearch(SPACE, 12),
        lambda: HalvingSearch(SPACE.all()),
        lambda: random_search(SPACE, 9, 1),
    ):
        assert [strategy_key(t.strategy) for t in play(make())] == [
            strategy_key(t.strategy) for t in play(make())
        ]


def test_coverage_beats_cleverness_in_a_small_space() -> None:
    """The dossier's simulation: scores of 64 strategies with spread .12 and error .042; regret of the best
    of 8 random strategies is several times that of all 64."""
    generator = random.Random(0)
    regret = {8: 0.0, 64: 0.0}
    for _ in range(300):
        true = [generator.gauss(0, 0.12) for _ in range(64)]
        seen = [value + generator.gauss(0, 0.042) for value in true]
        for count in regret:
            tried = generator.sample(range(64), count)
            regret[count] += (max(true) - true[max(tried, key=seen.__getitem__)]) / 300
    assert regret[8] == pytest.approx(0.12, abs=0.03)
    assert regret[64] == pytest.approx(0.016, abs=0.01)
