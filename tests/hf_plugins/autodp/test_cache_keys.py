import hashlib

import pytest

from hf_plugins.autodp.cache_keys import canonical_json, digest, rows_key, step_key

BASE = {
    "name": "clean",
    "version": "1",
    "params": {"a": 1},
    "prompt": "p",
    "model": "m",
    "revision": "r",
    "seed": 0,
}


def test_digest_by_hand() -> None:
    assert digest("ab", "c") == hashlib.sha256(b"2:ab1:c").hexdigest()
    assert digest("ab", "c") != digest("a", "bc")


@pytest.mark.parametrize(
    "change",
    [
        {"name": "x"},
        {"version": "2"},
        {"params": {"a": 2}},
        {"prompt": "q"},
        {"model": "n"},
        {"revision": "s"},
        {"seed": 1},
    ],
)
def test_whatever_can_change_the_output_changes_the_key(change: dict) -> None:
    assert step_key("root", **BASE) != step_key("root", **BASE | change)


def test_upstream_rows_change_the_key_and_equal_content_does_not() -> None:
    rows = [{"q": "a", "a": "b"}, {"q": "c", "a": None}]
    same = [{"a": "b", "q": "a"}, {"a": None, "q": "c"}]
    assert rows_key(rows) == rows_key(same)
    assert rows_key(rows) != rows_key(rows[::-1])
    assert rows_key(rows) != rows_key([{"q": "a", "a": "b."}, rows[1]])
    assert step_key(rows_key(rows), **BASE) != step_key(rows_key(rows[:1]), **BASE)


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, object()])
def test_keys_need_json(value: object) -> None:
    with pytest.raises(ValueError, match="Use numbers, strings and lists"):
        canonical_json(value)
