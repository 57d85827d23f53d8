"""Measures: hand values, Chinese and English alike, empty input, intervals."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_plugins.embed_parrot.recovery import (
    bleu,
    bootstrap_interval,
    entity_recall,
    multiset_f1,
    rouge_l,
    rouge_n,
    text_units,
    token_matches,
)
from tests.hf_plugins.embed_parrot import reference
from tests.hf_plugins.embed_parrot.tiny import texts


def test_units_of_both_languages() -> None:
    assert text_units("It's 5 EUR, ok?") == ["it", "'", "s", "5", "eur", ",", "ok", "?"]
    zh = texts("zh")[0]
    assert len(text_units(zh)) == len(zh.replace(" ", ""))
    assert text_units("A1\u4e2d\u6587_B") == ["a1", "\u4e2d", "\u6587", "_", "b"]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_equal_pairs_score_full_marks(language: str) -> None:
    """An English tokenizer would drop every Chinese sign and give 0 here."""
    for text in texts(language)[:20]:
        assert rouge_l(text, text) == 1.0
        assert rouge_n(text, text, 1) == rouge_n(text, text, 2) == 1.0
        assert bleu([text], [text]) == pytest.approx(100)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_empty_prediction_scores_nothing(language: str) -> None:
    text = texts(language)[0]
    assert rouge_l(text, "") == rouge_n(text, "", 1) == rouge_n(text, "", 2) == 0.0
    assert bleu([text], [""]) == 0.0
    assert bleu([""], [""]) == 0.0
    assert rouge_l("", "") == rouge_n("", "", 1) == 1.0
    assert multiset_f1([1], []) == 0.0
    assert multiset_f1([], []) == 1.0


def test_short_equal_sentence_is_not_punished() -> None:
    assert bleu(["\u4f60\u597d"], ["\u4f60\u597d"]) == pytest.approx(100)
    assert rouge_n("one", "one", 2) == 1.0
    assert rouge_n("one", "two", 2) == 0.0


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.sampled_from("abc"), max_size=9), st.lists(st.sampled_from("abc"), max_size=9))
def test_rouge_l_agrees_with_the_full_table(a: list[str], b: list[str]) -> None:
    common = reference.longest_common(a, b)
    expected = 2 * common / (len(a) + len(b)) if a and b else float(a == b)
    assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(expected)


def test_bleu_by_hand() -> None:
    """Reference a b c d e, guess a b c d: precisions all 1, brevity exp(1 - 5/4). With a b x d: 3/4 of one,
    1/3 of two, no three in a row: 0.
    """
    assert bleu(["a b c d e"], ["a b c d"]) == pytest.approx(100 * math.exp(-0.25))
    assert bleu(["a b c d"], ["a b x d"]) == 0.0
    assert bleu(["a b c d"], ["a b x d"], max_order=2) == pytest.approx(100 * math.sqrt(0.75 / 3))


def test_bags_count_repeats() -> None:
    """Truth {a a b}, guess {a b b}: two in common of three and three, F1 2/3; as sets it would be 1."""
    assert multiset_f1("aab", "abb") == pytest.approx(2 / 3)
    # Two in common of three and two.
    assert multiset_f1("aab", "ab") == pytest.approx(4 / 5)


def test_tokens_are_compared_in_place() -> None:
    assert token_matches([1, 2, 3], [1, 3, 2]) == (1, 3)
    assert token_matches([0, 5, 6, 0], [0, 5, 7, 9], ignore=frozenset({0})) == (1, 2)
    with pytest.raises(ValueError, match="token accuracy compares position by position; got .*2 right and 1"):
        token_matches([1, 2], [1])


def test_entities() -> None:
    assert entity_recall(["Anna Lee", "555-1234"], "call anna lee now") == 0.5
    assert entity_recall(["555 1234"], "at 5551234.") == 1.0
    assert math.isnan(entity_recall([], "text"))


def test_interval_covers_the_mean_of_texts() -> None:
    """For the mean of 400 coin flips the 95 % interval is about +-0.049."""
    flips = np.random.default_rng(0).integers(0, 2, 400).astype(float)
    interval = bootstrap_interval(lambda index: float(flips[index].mean()), 400)
    assert interval.mean == flips.mean()
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.12)
    assert interval.low < interval.mean < interval.high
    assert bootstrap_interval(lambda index: 1.0, 3) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="an interval needs at least one text"):
        bootstrap_interval(lambda index: 0.0, 0)
