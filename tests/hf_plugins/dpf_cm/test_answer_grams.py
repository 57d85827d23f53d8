import pytest

from hf_plugins.dpf_cm.answer_grams import AnswerGrams


def test_completions_by_hand() -> None:
    """n = 3: 1 2 3 4 has the grams 123 and 234; behind 1 2 only 3 completes one, behind 2 3 only 4."""
    index = AnswerGrams(3, secret=b"k")
    index.add("s", index.grams([1, 2, 3, 4]))
    assert index.completions([9, 1, 2]) == {3: {"s"}}
    assert index.completions([2, 3]) == {4: {"s"}}
    assert index.completions([3, 4]) == {}
    assert index.completions([2]) == {}
    assert index.sizes == {"s": 2}


def test_samples_that_share_a_gram() -> None:
    index = AnswerGrams(2)
    index.add("a", index.grams([1, 2, 3]))
    index.add("b", index.grams([1, 2, 4]))
    assert index.completions([1]) == {2: {"a", "b"}}
    assert index.completions([2]) == {3: {"a"}, 4: {"b"}}
    assert index.hits([1, 2, 3, 1, 2]) == {"a": 2, "b": 1}
    index.remove(["a", "unknown"])
    assert index.completions([1]) == {2: {"b"}}
    assert index.completions([2]) == {4: {"b"}}
    index.remove(["b"])
    assert index._next == {}
    assert index.sizes == {}


def test_hashes_need_the_secret() -> None:
    grams = AnswerGrams(3, secret=b"one").grams([1, 2, 3])
    assert grams != AnswerGrams(3, secret=b"two").grams([1, 2, 3])
    assert grams == AnswerGrams(3, secret=b"one").grams([1, 2, 3])
    assert len(grams[0].tail) == 16


def test_short_answers_and_wrong_length() -> None:
    assert AnswerGrams(10).grams([1, 2, 3]) == []
    assert AnswerGrams(2).grams([1, 1, 1]) == AnswerGrams(2).grams([1, 1])
    with pytest.raises(ValueError, match="n-grams need a length of 2 or more; got .*1"):
        AnswerGrams(1)
