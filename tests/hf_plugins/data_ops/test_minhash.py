import random
import sys

import numpy as np
import pytest
from datasets import Dataset

from hf_plugins.data_ops.minhash import (
    BandIndex,
    DocumentDeduplicator,
    DocumentMinhashDeduplicator,
    bands_for,
    jaccard,
    shingles,
    signatures,
)
from hf_plugins.data_ops.op import OpContext

ONE = (
    "患者三天前受凉后出现发热咳嗽伴有咽痛流涕及全身乏力症状无胸闷气促"
    "自行服药后未见明显好转今来就诊要求检查治疗并咨询饮食注意事项谢谢医生"
)
TWO = ONE[:-1] + "师"


def test_one_character_of_chinese() -> None:
    """66 characters have 64 shingles of 3; another last character changes one of them: J = 63/65 = 0.969.

    In the middle three change: 61/67 = 0.910. At blanks the whole sentence is one token: J = 0.
    """
    assert len(ONE) == 66
    assert jaccard(shingles(ONE), shingles(TWO)) == pytest.approx(63 / 65)
    middle = ONE[:30] + "X" + ONE[31:]
    assert jaccard(shingles(ONE), shingles(middle)) == pytest.approx(61 / 67)
    assert jaccard(shingles(ONE, tokenization="space"), shingles(middle, tokenization="space")) == 0.0
    data = Dataset.from_dict({"text": [ONE, middle, "别的内容" * 5]})
    assert len(DocumentMinhashDeduplicator().run(data)) == 2
    assert len(DocumentMinhashDeduplicator(tokenization="space", window_size=5).run(data)) == 3


def test_threshold_holds_exactly() -> None:
    """Pairs just below and just above the threshold are told apart by their true Jaccard."""
    middle = ONE[:30] + "X" + ONE[31:]
    data = Dataset.from_dict({"text": [ONE, middle]})
    assert len(DocumentMinhashDeduplicator(jaccard_threshold=61 / 67).run(data)) == 1
    assert len(DocumentMinhashDeduplicator(jaccard_threshold=61 / 67 + 1e-9).run(data)) == 2


def test_planted_duplicates_are_found_and_named() -> None:
    rng = random.Random(0)
    alphabet = [chr(0x4E00 + i) for i in range(3000)]
    base = ["".join(rng.choices(alphabet, k=180)) for _ in range(300)]
    copies = [text[:90] + rng.choice(alphabet) + text[91:] for text in base[:100]]
    context = OpContext()
    data = Dataset.from_dict({"text": base + copies})
    out = DocumentMinhashDeduplicator().run(data, context)
    # J = 175/181 = 0.967; a pair misses all bands with probability below 1e-9 by the S curve.
    assert list(out["text"]) == base
    rows = context.ledger.rows()
    assert len(rows) == 100
    assert all(row["reason"].startswith("near-duplicate of ") for row in rows)
    assert min(row["value"] for row in rows) >= 0.8


def test_no_chain_of_ever_less_similar_texts() -> None:
    """b is near a, c near b but not near a: c is compared with texts that stay, so it stays."""
    text = [chr(0x4E00 + i) for i in range(100)]
    a, b, c = text[:], text[:], text[:]
    b[10], c[10], c[50], c[60] = "x", "x", "y", "z"
    texts = ["".join(t) for t in (a, b, c)]
    sets = [shingles(t) for t in texts]
    assert jaccard(sets[0], sets[1]) > 0.9 > jaccard(sets[0], sets[2])
    assert jaccard(sets[1], sets[2]) < 0.9
    c2 = b[:]
    c2[50] = "y"
    third = "".join(c2)
    assert jaccard(sets[1], shingles(third)) > 0.9 > jaccard(sets[0], shingles(third))
    data = Dataset.from_dict({"text": [texts[0], texts[1], third]})
    assert list(DocumentMinhashDeduplicator(jaccard_threshold=0.9).run(data)["text"]) == [texts[0], third]


def test_signatures_estimate_jaccard() -> None:
    """4096 permutations: the standard error at 0.910 is 0.0045, so 0.03 is beyond 6 of them."""
    middle = ONE[:30] + "X" + ONE[31:]
    sig = signatures([shingles(ONE), shingles(middle)], num_permutations=4096)
    assert abs(float(np.mean(sig[0] == sig[1])) - 61 / 67) < 0.03


def test_bands_find_pairs_at_the_threshold() -> None:
    """0.8 with 128: r = 5, b = 25 gives 1 - (1 - 0.32768)^25 = 0.99995; r = 6, b = 21 only 0.9983."""
    assert bands_for(0.8, 128) == (25, 5)
    for threshold in (0.5, 0.7, 0.9):
        bands, rows = bands_for(threshold, 128)
        assert bands * rows <= 128
        assert 1 - (1 - threshold**rows) ** bands >= 0.999
        # One row more would lose too many.
        more = 128 // (rows + 1)
        assert 1 - (1 - threshold ** (rows + 1)) ** more < 0.999
    assert bands_for(0.01, 128) == (128, 1)


def test_empty_and_short_texts_are_no_duplicates_of_each_other() -> None:
    data = Dataset.from_dict({"text": ["", "", None, "头", "头痛"]})
    assert len(DocumentMinhashDeduplicator().run(data)) == 5
    assert shingles("头") == {"头"}
    assert jaccard(frozenset(), frozenset()) == 0.0


def test_exact_deduplication() -> None:
    data = Dataset.from_dict({"text": ["Ab!", "Ab!", "ab", "Ab"]})
    assert len(DocumentDeduplicator().run(data)) == 3
    assert len(DocumentDeduplicator(lowercase=True, ignore_non_character=True).run(data)) == 1


def test_own_bands_and_progress() -> None:
    told: list[tuple[str, int, int]] = []
    context = OpContext(progress=lambda *what: told.append(what))
    data = Dataset.from_dict({"text": [ONE, TWO]})
    op = DocumentMinhashDeduplicator(num_bands=16, num_rows_per_band=8)
    assert len(op.run(data, context)) == 1
    assert told == [("document_minhash_deduplicator", 2, 2)]


def test_wrong_parameters() -> None:
    for wrong, match in (
        ({"jaccard_threshold": 80}, r"jaccard_threshold must lie in \(0, 1\]; got 80: it is a share"),
        ({"num_bands": 4}, "give num_bands and num_rows_per_band together"),
        ({"num_bands": 64, "num_rows_per_band": 4}, "exceeds num_permutations"),
        ({"tokenization": "bpe"}, "tokenization must be one of"),
        ({"window_size": 0}, "must be >= 1"),
    ):
        with pytest.raises(ValueError, match=match):
            DocumentMinhashDeduplicator(**wrong)


def test_missing_rensa_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(ImportError, match=r"MinHash needs rensa; install the extra"):
        signatures([frozenset("a")])


def test_rows_that_share_a_band_are_near() -> None:
    index = BandIndex(bands=2, rows=2)
    signatures = [[1, 2, 3, 4, 0], [1, 2, 9, 9, 0], [7, 7, 3, 4, 0], [2, 1, 4, 3, 0]]
    keys = index.keys(np.array(signatures, np.uint32))
    # The fifth number is in no band; the order within a band counts.
    assert keys == index.keys(np.array(signatures, np.uint32)[:, :4])
    assert keys[0][0] == keys[1][0] != keys[3][0]
    assert index.near(keys[0]) == []
    for row, mine in enumerate(keys):
        index.add(row, mine)
    assert [index.near(mine) for mine in keys] == [[0, 1, 2], [0, 1], [0, 2], [3]]
    # Bands do not mix: what stands in the first is not looked for in the second.
    assert index.near([keys[0][1], keys[0][0]]) == []
