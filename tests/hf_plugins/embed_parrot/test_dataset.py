"""Reading, splitting and batching."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from hf_plugins.embed_parrot.dataset import StatesCollator, StatesDataset, encode, read_texts, split_texts
from tests.hf_plugins.embed_parrot.tiny import TEXTS, texts, tokenizer

SIZES = {"num_test": 10, "num_calibrate": 5, "num_fit": 30, "max_length": 20}


def test_files_of_each_kind(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n two \none\n", encoding="utf-8")
    assert read_texts(tmp_path / "a.txt") == ["one", "two"]
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps({"body": "x", "text": "y"}) + "\n")
    assert read_texts(tmp_path / "b.jsonl.gz") == ["y"]
    assert read_texts(tmp_path / "b.jsonl.gz", field="body") == ["x"]
    assert len(read_texts(TEXTS / "zh.jsonl")) == 120


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no text file .*nowhere.txt"):
        read_texts(tmp_path / "nowhere.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no text"):
        read_texts(tmp_path / "empty.txt")
    (tmp_path / "c.jsonl").write_text('{"words": "x"}\n')
    with pytest.raises(ValueError, match="name it behind the path, as in"):
        read_texts(tmp_path / "c.jsonl")
    with pytest.raises(ValueError, match="no text field body in a row with words"):
        read_texts(tmp_path / "c.jsonl", field="body")


def test_no_text_is_in_two_parts() -> None:
    rows = texts()[:60]
    split = split_texts(tokenizer(), {"a": rows, "b": rows[:12]}, (), **SIZES)
    parts = [split.fit, split.calibrate, split.test["a"] + split.test["b"]]
    keys = [{tuple(x.tolist()) for x in part} for part in parts]
    assert not keys[0] & keys[1]
    assert not keys[0] & keys[2]
    assert not keys[1] & keys[2]
    assert [len(split.test["a"]), len(split.calibrate), len(split.fit)] == [10, 5, 30]
    assert max(map(len, split.fit)) == 20
    assert split.num_fit_tokens == sum(len(x) for x in split.fit)


def test_split_is_the_same_each_time_and_moves_with_the_seed() -> None:
    first, again, other = (split_texts(tokenizer(), {"a": texts()}, (), **SIZES, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.cat(first.test["a"]), torch.cat(again.test["a"]))
    assert not torch.equal(torch.cat(first.test["a"]), torch.cat(other.test["a"]))


def test_public_text_of_its_own() -> None:
    split = split_texts(tokenizer(), {"zh": texts("zh")[:8]}, texts(), **SIZES)
    assert len(split.test["zh"]) == 8
    assert len(split.fit) == 30


def test_too_little_text() -> None:
    with pytest.raises(ValueError, match="at least one data set, each with at least one text"):
        split_texts(tokenizer(), {"a": []}, (), **SIZES)
    with pytest.raises(
        ValueError, match=r"no text is left to fit the attacks on; give more texts, or public text"
    ):
        split_texts(tokenizer(), {"a": ["only one"]}, (), **SIZES)


def test_a_tokenizer_of_another_world() -> None:
    with pytest.raises(ValueError, match="made no token of any text; check that it belongs to the model"):
        encode(lambda rows, **options: {"input_ids": [[] for _ in rows]}, ["a"], 8)


def test_batches_are_padded_on_the_right() -> None:
    table = torch.randn(9, 4)
    rows = StatesDataset(
        [torch.ones(2, 4), torch.ones(3, 4)], [torch.tensor([1, 2]), torch.tensor([3, 4, 5])]
    )
    batch = StatesCollator(table)([rows[0], rows[1]])
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[1, 2, -100], [3, 4, 5]]
    assert torch.equal(batch["labels_embeds"][1], table[[3, 4, 5]])
    assert (batch["hidden_states"][0, 2] == 0).all()
    assert len(rows) == 2


def test_states_and_tokens_must_fit() -> None:
    with pytest.raises(
        ValueError, match="each text needs as many states as tokens; got 2 states of 1 texts and 3"
    ):
        StatesDataset([torch.ones(2, 4)], [torch.tensor([1, 2, 3])])
    with pytest.raises(ValueError, match="each text needs as many states"):
        StatesDataset([], [])
