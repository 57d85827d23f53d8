import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset

from hf_plugins.data_ops.decontamination import DecontaminationFilter, word_ngrams
from hf_plugins.data_ops.op import OpContext

EVAL = "下列哪一种药物最适合用于治疗轻度高血压患者"


def _file(folder: Path, rows: list[dict[str, str]], name: str = "eval.jsonl") -> str:
    path = folder / name
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return str(path)


def test_runs_of_words() -> None:
    assert word_ngrams("A b, C", 2) == {"a b", "b c"}
    assert word_ngrams("a", 3) == {"a"}
    assert word_ngrams("。", 3) == set()


@pytest.mark.parametrize("name", ["eval.jsonl", "eval.jsonl.gz"])
def test_thirteen_shared_words_drop_a_row(tmp_path: Path, name: str) -> None:
    """12 of its 21 characters may stand in a training row, 13 may not; punctuation does not hide them."""
    op = DecontaminationFilter(
        eval_files=(_file(tmp_path, [{"question": EVAL}], name),), eval_keys=("question",)
    )
    rows = ["前文" + EVAL[:12], "前文" + EVAL[:13] + "后文", "，".join(EVAL), "无关内容" * 8]
    context = OpContext()
    out = op.run(Dataset.from_dict({"text": rows}), context)
    assert list(out["text"]) == [rows[0], rows[3]]
    assert {row["reason"] for row in context.ledger.rows()} == {f"shares 13 words with {name}"}


def test_short_evaluation_texts_count_whole(tmp_path: Path) -> None:
    """8 words are held against a row, 7 would hit by chance."""
    path = _file(tmp_path, [{"text": "阿司匹林的副作用"}, {"text": "头痛怎么办呢吗"}])
    op = DecontaminationFilter(eval_files=(path,))
    rows = ["请问阿司匹林的副作用有哪些", "头痛怎么办呢吗？我睡不好"]
    assert list(op.run(Dataset.from_dict({"text": rows}))["text"]) == rows[1:]


def test_fingerprint_follows_the_file(tmp_path: Path) -> None:
    before = DecontaminationFilter(eval_files=(_file(tmp_path, [{"text": EVAL}]),)).fingerprint()
    after = DecontaminationFilter(eval_files=(_file(tmp_path, [{"text": EVAL + "x"}]),)).fingerprint()
    assert before != after


def test_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name the evaluation sets to keep out"):
        DecontaminationFilter(eval_files=())
    with pytest.raises(ValueError, match=r"min_words must lie in \[1, ngram=13\]; got 20"):
        DecontaminationFilter(eval_files=("x",), min_words=20)
    op = DecontaminationFilter(eval_files=(_file(tmp_path, [{"q": "a"}]),))
    with pytest.raises(ValueError, match="has no text under text; set eval_keys to its columns"):
        op.run(Dataset.from_dict({"text": ["a"]}))
