import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_plugins.data_ops.text import (
    clean_html,
    has_cjk,
    is_resident_id,
    join_text,
    map_text,
    ngrams,
    normalize_whitespace,
    plain_words,
    repetition_ratio,
    replace_emails,
    replace_ips,
    replace_links,
    replace_phones,
    replace_resident_ids,
    special_characters_ratio,
    tokens,
)


def test_tokens_of_mixed_text() -> None:
    assert tokens("血压140 mmHg, it's高") == ["血", "压", "140", "mmHg", "it's", "高"]
    assert tokens("a b\tc", "space") == ["a", "b", "c"]
    assert tokens("头 痛", "character") == ["头", "痛"]
    assert tokens("a-b, c", "punctuation") == ["a", "b", "c"]
    assert has_cjk("COVID感染")
    assert not has_cjk("COVID-19, naïve")


def test_unknown_tokenization_lists_the_known() -> None:
    with pytest.raises(ValueError, match="tokenization must be one of character, space, punctuation, words"):
        tokens("a", "bpe")


def test_repetition_closed_form() -> None:
    """ababab has bigrams ab ba ab ba ab: counts 3 and 2, all repeated, R=1. abcab: ab bc ca ab -> 2/4."""
    assert repetition_ratio("ababab", 2) == 1.0
    assert repetition_ratio("abcab", 2) == 0.5
    assert repetition_ratio("abc", 2) == 0.0
    assert repetition_ratio("ab", 3) == 0.0
    assert repetition_ratio("", 1) == 0.0
    assert repetition_ratio(["x", "y", "x", "y", "z"], 2) == 0.5


@given(st.text(alphabet="ab头", max_size=30), st.integers(1, 5))
@settings(derandomize=True, max_examples=100)
def test_repetition_matches_counting(text: str, n: int) -> None:
    grams = ngrams(text, n)
    expected = sum(1 for gram in grams if grams.count(gram) > 1) / len(grams) if grams else 0.0
    assert repetition_ratio(text, n) == pytest.approx(expected)


def test_special_characters_by_hand() -> None:
    """'ab1 头!' has 6 characters, of which a, b and the Han character are letters: 3/6 special."""
    assert special_characters_ratio("ab1 头!") == pytest.approx(0.5)
    assert special_characters_ratio("") == 0.0
    # A combining mark belongs to its letter.
    assert special_characters_ratio("e\u0301") == 0.0


def test_html_goes_and_medicine_stays() -> None:
    page = "<p>血压&lt;140 且 &gt;90</p><script>var x='<p>';</script><br/>"
    page += "fever <b class='x'>39</b>&nbsp;C<!-- ad -->"
    assert clean_html(page) == "\n血压<140 且 >90\n\nfever 39\xa0C"
    assert clean_html("BP <140 and p<0.05, a<b") == "BP <140 and p<0.05, a<b"
    assert clean_html("&amp;lt;b&amp;gt;x") == "x"


@given(
    st.lists(st.sampled_from(["<p>", "</p>", "<b>", "&lt;", "&gt;", "&amp;", "b", "<", ">", "头", "script"]))
)
@settings(derandomize=True, max_examples=200)
def test_html_is_idempotent(parts: list[str]) -> None:
    once = clean_html("".join(parts))
    assert clean_html(once) == once


def test_personal_data_is_found() -> None:
    assert replace_emails("写信a.b+c@mail.example.com谢谢", "E") == "写信E谢谢"
    assert (
        replace_phones("电话13812345678，+86 139-1234-5678; 订单138123456789", "P")
        == "电话P，P; 订单138123456789"
    )
    assert replace_ips("from 10.0.0.255 v1.2.3.4.5 999.1.1.1", "I") == "from I v1.2.3.4.5 999.1.1.1"
    assert replace_links("见http://a.cn/x?y=1。www.b.com/z 完", "L") == "见L。L 完"


def test_resident_id_check_digit_by_hand() -> None:
    """11010519491231002X is the standard's own example: weighted sum 167, 167 % 11 = 2, check X.

    1*7+1*9+0+1*5+0+5*4+1*2+9*1+4*6+9*3+1*7+2*9+3*10+1*5+0+0+2*2 = 167; (167 + 10) % 11 = 1.
    """
    assert is_resident_id("11010519491231002X")
    assert is_resident_id("11010519491231002x")
    assert not is_resident_id("110105194912310021")
    assert not is_resident_id("11010519491331002X")
    assert not is_resident_id("1101051949123100")
    assert replace_resident_ids("号11010519491231002X和110105194912310021", "N") == "号N和110105194912310021"


def test_whitespace() -> None:
    assert normalize_whitespace("  a \t b \r\n\r\n\r\n\n c　d ") == "a b\n\nc d"


def test_plain_words_fold_editions() -> None:
    assert plain_words("Ｆｅｖｅｒ，发 热!") == ["fever", "发", "热"]


def test_text_inside_turns() -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert map_text(chat, str.upper) == [
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "B"},
    ]
    assert map_text([["q", "r"], None, 3], str.upper) == [["Q", "R"], None, 3]
    assert join_text(chat) == "a\nb"
    assert join_text(None) == ""


def test_patterns_stay_linear_on_long_rows() -> None:
    """A megabyte of almost-matches takes milliseconds, not minutes."""
    hostile = "<" * 300_000 + "a@" * 100_000 + "1.1." * 100_000 + "&#" * 100_000
    for change in (
        clean_html,
        normalize_whitespace,
        *(lambda t, f=f: f(t, "") for f in (replace_emails, replace_ips, replace_links, replace_phones)),
    ):
        assert re.match(r"", change(hostile))
