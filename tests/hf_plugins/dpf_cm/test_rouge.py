import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_plugins.dpf_cm.rouge import RunningLCS, lcs_length, rouge_l
from tests.hf_plugins.dpf_cm.reference import lcs_table

words = st.lists(st.sampled_from("abc头痛"), max_size=12)


def test_by_hand() -> None:
    """abcde and ace share ace: F = 2*3/(5+3) = 0.75. Equal Chinese texts score 1 (rouge_score: 0)."""
    assert rouge_l("abcde", "ace") == 0.75
    assert rouge_l("头痛三天", "头痛三天") == 1.0
    assert rouge_l("", "") == 0.0
    assert rouge_l("abc", "") == 0.0
    assert rouge_l("abc", "xyz") == 0.0


@given(words, words)
@settings(derandomize=True, max_examples=200)
def test_against_the_table(a: list[str], b: list[str]) -> None:
    assert lcs_length(a, b) == lcs_table(a, b)


@given(words.filter(len), words, words)
@settings(derandomize=True, max_examples=200)
def test_bound_is_never_exceeded(a: list[str], start: list[str], rest: list[str]) -> None:
    running = RunningLCS(a)
    for token in start:
        running.push(token)
    assert running.length == lcs_table(a, start)
    assert rouge_l([*start, *rest], a) <= running.reachable() + 1e-12


@given(words.filter(len), st.integers(0, 12), st.integers(0, 5))
@settings(derandomize=True, max_examples=100)
def test_bound_is_reached_behind_a_beginning_with_noise(a: list[str], cut: int, noise: int) -> None:
    """After a[:k] and alien tokens the rest of a brings the text exactly to the bound."""
    start = [*a[:cut], *["#"] * noise]
    running = RunningLCS(a)
    for token in start:
        running.push(token)
    assert rouge_l([*start, *a[cut:]], a) == pytest.approx(running.reachable())


def test_abort_rule_of_the_threshold() -> None:
    """|a| = 10, nothing in common: 20/(20+t) <= 0.85 from t >= 3.53, that is 0.353 |a|."""
    running = RunningLCS("abcdefghij")
    for _ in range(3):
        running.push("x")
    assert running.reachable() > 0.85
    running.push("x")
    assert running.reachable() < 0.85
    assert RunningLCS("").reachable() == 0.0
