import numpy as np
import pytest

from hf_plugins.autodp.features import (
    hash_embed,
    quality_features,
    repetition_ratio,
    special_ratio,
    window_hashes,
)


def test_equal_windows_have_equal_hashes() -> None:
    hashes = window_hashes("abcabcabd", 3)
    assert len(hashes) == 7
    assert hashes[0] == hashes[3]
    assert len(np.unique(hashes)) == 4
    assert len(window_hashes("ab", 3)) == 0
    assert window_hashes("医疗问答", 4).tolist() == window_hashes("x医疗问答", 4)[1:].tolist()


def test_no_collision_on_many_short_windows() -> None:
    text = "".join(chr(0x4E00 + (i * 7919) % 20000) for i in range(20000))
    windows = {text[i : i + 12] for i in range(len(text) - 11)}
    assert len(np.unique(window_hashes(text, 12))) == len(windows)


def test_embeddings_of_near_texts_are_near() -> None:
    near, far, zh, zh_near, empty = 1, 2, 3, 4, 5
    e = hash_embed(
        [
            "What causes burns?",
            "What causes BURNS ?",
            "the train is late",
            "子宫内膜癌的发病机制",
            "子宫内膜癌发病机制",
            "",
        ]
    )
    assert e[0] @ e[near] > 0.8 > 0.4 > e[0] @ e[far]
    assert e[zh] @ e[zh_near] > 0.7
    assert np.linalg.norm(e[:5], axis=1) == pytest.approx(np.ones(5), abs=1e-6)
    assert (e[empty] == 0).all()


def test_quality_features_by_hand() -> None:
    """ "aaaa" has bigrams aa aa aa: 2 of 3 occurred before. "a#b!" has one odd sign, # (Po is common: # is
    Po).
    """
    assert repetition_ratio("aaaa") == pytest.approx(2 / 3)
    assert repetition_ratio("") == 0.0
    assert special_ratio("a$b+") == 0.5
    assert special_ratio("") == 0.0
    found = quality_features(["ab", " "], ["aaaa", "x"])
    assert found.shape == (2, 7)
    assert found[0].tolist() == pytest.approx([np.log(3), np.log(5), 0, 2 / 3, 0, 0, 0])
    assert found[1, 6] == 1
    assert quality_features([], []).shape == (0, 7)
