import pytest

from hf_plugins.autodp.planted import KINDS, plant
from tests.hf_plugins.autodp.tiny import PAIRS


def test_each_kind_as_often_as_asked() -> None:
    found = plant(PAIRS, dict.fromkeys(KINDS, 0.1))
    kinds = [kind for _, _, kind in found]
    assert {kind: kinds.count(kind) for kind in (*KINDS, "clean")} == dict.fromkeys(KINDS, 6) | {"clean": 12}
    assert found == plant(PAIRS, dict.fromkeys(KINDS, 0.1))
    assert found != plant(PAIRS, dict.fromkeys(KINDS, 0.1), seed=1)


def test_what_each_defect_does() -> None:
    answers = {answer for _, answer in PAIRS}
    for (question, answer), (q, a, kind) in zip(PAIRS, plant(PAIRS, dict.fromkeys(KINDS, 0.12)), strict=True):
        if kind == "clean":
            assert (q, a) == (question, answer)
        if kind == "missing":
            assert (q == "") != (a == "")
        if kind == "markup":
            assert "<div>" in a
            assert "@spam.example" in a
        if kind == "garbled":
            assert sorted(a.replace(" ", "")) == sorted(answer.replace(" ", ""))
            assert a != answer
        if kind == "swapped":
            assert a in answers
        if kind == "duplicate":
            assert (q, a[:-1]) in {(x, y[:-1]) for x, y in PAIRS}
        if kind == "degraded":
            assert a != answer
            assert a[1] + a[0] + a[2:4] == answer[:4]
        if kind == "short":
            assert a == answer[: len(answer) // 10]
        if kind == "boilerplate":
            assert a.count("Click here") >= 2


def test_wrong_shares() -> None:
    with pytest.raises(ValueError, match="; a defect is one of .*markup"):
        plant(PAIRS, {"typo": 0.1})
    with pytest.raises(ValueError, match="must sum to at most 1"):
        plant(PAIRS, {"short": 0.6, "missing": 0.6})
