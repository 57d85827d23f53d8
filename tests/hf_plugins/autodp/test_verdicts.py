import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from hf_plugins.autodp.verdicts import (
    StoppingRule,
    bootstrap_score,
    check_unparsed,
    judge_until,
    kendall_tau,
    length_controlled,
    parse_verdict,
    question_values,
    standard_error,
    worst_case_error,
)
from tests.hf_plugins.autodp import reference

WORDS = ["win", "tie", "lose"]
verdicts = st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(WORDS)), min_size=1, max_size=30)


@given(verdicts)
def test_score_equals_the_formula_and_changes_sign_when_models_swap(pairs: list[tuple[str, str]]) -> None:
    first, second = (list(side) for side in zip(*pairs, strict=True))
    values = question_values(first, second)
    assert values.mean() == pytest.approx(reference.score(first, second), abs=1e-12)
    assert question_values(second, first).mean() == pytest.approx(-values.mean(), abs=1e-12)
    assert np.abs(values).max() <= 1


def test_a_judge_of_places_scores_exactly_zero() -> None:
    """Always "response 1 wins": (1 - 1) / 2 = 0 for each question, whatever the answers."""
    assert (question_values(["win"] * 7, ["win"] * 7) == 0).all()
    assert (question_values(["tie"] * 7, ["tie"] * 7) == 0).all()


def test_score_by_hand() -> None:
    """Wins 1 + 1, losses 1 (second order: response 1 is the baseline): (2 - 1) / (2 * 2) = 0.25."""
    values = question_values(["win", "lose"], ["lose", "tie"])
    assert values.tolist() == [1.0, -0.5]
    assert bootstrap_score(values).value == 0.25


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("win", "win"),
        ("<think>lose</think>\nReasons first.\n**Tie.**", "tie"),
        ("赢", "win"),
        ("【输】", "lose"),
        ("Verdict: lose", "lose"),
        ('{"tie"}', "tie"),
        ("response 1 cannot win", None),
        ("不赢", None),
        ("", None),
        ("win\nor maybe not", None),
    ],
)
def test_only_the_verdict_line_counts(text: str, verdict: str | None) -> None:
    """Regression, defect 11: the release looked for the word anywhere in the reply."""
    assert parse_verdict(text) == verdict


def test_unreadable_verdicts_are_left_out_and_stop_when_many() -> None:
    values = question_values(["win"] * 20, ["lose"] * 19 + [None])
    assert check_unparsed(values) == 1
    score = bootstrap_score(values)
    assert (score.value, score.num_questions, score.num_unparsed) == (1.0, 19, 1)
    with pytest.raises(RuntimeError, match="one word .win, tie or lose. on its last line"):
        check_unparsed(question_values(["win"] * 20, ["lose"] * 18 + [None, None]))
    with pytest.raises(ValueError, match="both orders need every question once"):
        question_values(["win"], [])
    with pytest.raises(ValueError, match="at least one question with a value"):
        bootstrap_score(np.array([math.nan]))


def test_errors_by_hand() -> None:
    """1 / sqrt(400) = .05; with 30 % ties sqrt(.7 / 400) = .0418."""
    assert worst_case_error(400) == pytest.approx(0.05)
    assert worst_case_error(400, ties=0.3) == pytest.approx(0.0418, abs=5e-5)
    half = np.array([1.0, -1.0] * 200)
    assert standard_error(half) == pytest.approx(0.05, rel=2e-3)
    assert standard_error(np.array([1.0])) == 0.0


def test_the_bootstrap_interval_is_that_of_the_mean() -> None:
    """400 values, 30 % zeros: the percentile interval is the mean +- 1.96 * .0418 up to the resampling's
    error.
    """
    values = np.array([1.0] * 140 + [-1.0] * 140 + [0.0] * 120)
    score = bootstrap_score(values, resamples=4000)
    assert score.low == pytest.approx(-1.96 * 0.0418, abs=0.006)
    assert score.high == pytest.approx(1.96 * 0.0418, abs=0.006)
    assert score == bootstrap_score(values, resamples=4000)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=20))
def test_the_interval_holds_the_mean(values: list[float]) -> None:
    score = bootstrap_score(np.array(values), resamples=300, digits=12)
    assert score.low - 0.35 <= score.value <= score.high + 0.35
    assert min(values) - 1e-9 <= score.low <= score.high <= max(values) + 1e-9


def test_stopping_gives_up_an_equal_strategy_at_most_at_the_stated_rate() -> None:
    """True score = incumbent: over 2,000 simulated runs at most 5 % stop (binomial error .005; limit .075
    is 5 of them away: false alarm below 1e-6)."""
    generator = np.random.default_rng(0)
    rule, stopped = StoppingRule(), 0
    for _ in range(2000):
        values = generator.choice([-1.0, -0.5, 0, 0.5, 1.0], 400)
        seen = judge_until(lambda r, v=values: v[r.start : r.stop], 400, rule=rule, incumbent=0.0)
        stopped += len(seen) < 400
    assert stopped / 2000 < 0.075


def test_stopping_saves_questions_on_a_bad_strategy_and_never_on_a_good_one() -> None:
    generator = np.random.default_rng(0)
    values = generator.choice([-1.0, -0.5, 0.0], 400)
    ask = lambda r: values[r.start : r.stop]  # noqa: E731
    assert len(judge_until(ask, 400, rule=StoppingRule(), incumbent=0.3)) <= 80
    assert len(judge_until(ask, 400, rule=StoppingRule(), incumbent=-math.inf)) == 400
    assert len(judge_until(ask, 400, rule=None, incumbent=0.3)) == 400
    assert len(judge_until(lambda r: np.ones(len(r)), 400, rule=StoppingRule(), incumbent=0.3)) == 400
    # All verdicts agree: the width must not be zero.
    low, high = StoppingRule().bounds(np.ones(40))
    assert low < 0.99 < high


def test_the_winner_of_noisy_scores_is_overstated() -> None:
    """Best of 24 with true spread .12 and error .042 shows about .03 too much, hence the fresh score of
    the winner.
    """
    generator = np.random.default_rng(0)
    excess = []
    for _ in range(2000):
        true = generator.normal(0, 0.12, 24)
        seen = true + generator.normal(0, 0.042, 24)
        excess.append(seen.max() - true[seen.argmax()])
    assert np.mean(excess) == pytest.approx(0.03, abs=0.006)


def test_length_control_removes_what_length_explains() -> None:
    """Value = sign of the length difference: all of the score is length, the controlled one is about 0."""
    lengths = np.array([5.0] * 60 + [-5.0] * 20)
    values = np.sign(lengths)
    assert values.mean() == 0.5
    assert abs(length_controlled(values, lengths)) < 1e-9
    assert length_controlled(np.array([1.0, 0, 1, 0]), np.zeros(4)) == 0.5


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=15))
def test_kendall_against_loops_and_scipy(pairs: list[tuple[int, int]]) -> None:
    x, y = (list(map(float, side)) for side in zip(*pairs, strict=True))
    found = kendall_tau(x, y)
    if math.isnan(found):
        assert len(set(x)) == 1 or len(set(y)) == 1
    else:
        assert found == pytest.approx(reference.kendall_tau(x, y), abs=1e-12)
        assert found == pytest.approx(kendalltau(x, y).statistic, abs=1e-12)


def test_kendall_needs_pairs() -> None:
    with pytest.raises(ValueError, match="two lists of one length"):
        kendall_tau([1.0], [1.0, 2.0])
