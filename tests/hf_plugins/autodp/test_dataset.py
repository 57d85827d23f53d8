import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from datasets import Dataset

from hf_plugins.autodp.dataset import (
    ANSWER,
    DIRTY,
    HISTORY,
    QUESTION,
    StrategyRunner,
    clean_ops,
    read_rows,
    row_cells,
    split_rows,
    take_sample,
    without_questions,
)
from hf_plugins.autodp.planted import plant
from hf_plugins.autodp.storage import Cache
from hf_plugins.autodp.strategies import Space, Step
from hf_plugins.data_ops.chat import ScriptedChat
from hf_plugins.data_ops.op import ROW_ID, DataOp, OpContext
from tests.hf_plugins.autodp.tiny import PAIRS, rows, write_jsonl

SPACE = Space()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "q", "answer": "a", "x": 1}, ("q", "a")),
        ({"instruction": "q", "input": "i", "output": "a"}, ("q\ni", "a")),
        ({"prompt": "q", "completion": "a"}, ("q", "a")),
        ({"question": None, "answer": "无"}, ("", "")),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            ("q", "a"),
        ),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ("q", "a")),
    ],
)
def test_common_schemas(tmp_path: Path, row: dict, expected: tuple[str, str]) -> None:
    found = read_rows(write_jsonl(tmp_path / "x.jsonl", [row, row]))
    assert (found[0][QUESTION], found[0][ANSWER]) == expected
    assert ROW_ID in found.column_names


def test_earlier_turns_stay_as_history(tmp_path: Path) -> None:
    """Regression, defect 8: the release cut dialogues to two turns and dropped every other column."""
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(2) for role in ("user", "assistant")]
    found = read_rows(write_jsonl(tmp_path / "x.jsonl", [{"messages": turns, "source": "s"}]))
    assert found[0][HISTORY] == [
        {"role": "user", "content": "user 0"},
        {"role": "assistant", "content": "assistant 0"},
    ]
    assert (found[0][QUESTION], found[0][ANSWER], found[0]["source"]) == ("user 1", "assistant 1", "s")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="give the rows as .jsonl, .csv or .parquet"):
        read_rows(tmp_path / "absent.jsonl")
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ValueError, match="convert it first"):
        read_rows(tmp_path / "x.txt")
    (tmp_path / "bad.jsonl").write_text('{"question": "a"\nnot json')
    with pytest.raises(ValueError, match=" cannot be read as .* Check its first lines."):
        read_rows(tmp_path / "bad.jsonl")
    with pytest.raises(ValueError, match="name the columns with --question and --answer"):
        read_rows(write_jsonl(tmp_path / "c.jsonl", [{"x": "1"}]))
    with pytest.raises(ValueError, match="the rows have no column .*z, only x"):
        read_rows(write_jsonl(tmp_path / "d.jsonl", [{"x": "1"}]), question="x", answer="z")
    Dataset.from_dict({"question": [], "answer": []}).save_to_disk(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="holds no rows"):
        read_rows(tmp_path / "empty")


def test_splits_share_no_question() -> None:
    """Regression, defect 12: the release selected on what it called the test set."""
    table = rows(PAIRS + [(q.upper(), "another answer") for q, _ in PAIRS])
    parts = split_rows(table, {"dev": 10, "test": 10, "anchors": 5}, seed=0)
    asked = {name: {q.lower() for q in part[QUESTION]} for name, part in parts.items()}
    assert {name: len(part) for name, part in parts.items()} == {
        "dev": 10,
        "test": 10,
        "anchors": 5,
        "train": 70,
    }
    assert sum(map(len, asked.values())) == len(set.union(*asked.values())) == 60
    # The same questions stay held out when rows are added elsewhere.
    more = split_rows(rows(PAIRS), {"dev": 10, "test": 10, "anchors": 5}, seed=0)
    assert {q.lower() for q in more["dev"][QUESTION]} == asked["dev"]
    with pytest.raises(ValueError, match="lower num_dev, num_test or num_anchors"):
        split_rows(table, {"dev": 20, "test": 20}, seed=0)


def test_given_held_out_questions_leave_the_training_rows(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        kept = without_questions(rows(), [rows([(PAIRS[3][0].upper() + " ", "x")])])
    assert len(kept) == 59
    assert "1 training rows ask a held-out question" in caplog.text


def test_the_sample_keeps_the_share_of_dirty_rows() -> None:
    table = rows(PAIRS, **{DIRTY: [i % 3 == 0 for i in range(60)]})
    sample = take_sample(table, 0.2, method="stratified", seed=0)
    assert len(sample) == 12
    assert sum(sample[DIRTY]) == 4
    assert take_sample(rows(), 0.2, method="herding", seed=0).num_rows == 12


@dataclass(frozen=True, kw_only=True)
class Append(DataOp):
    """A step that writes its name behind every answer; one run is one call."""

    name: ClassVar[str] = "append"
    roles: ClassVar[tuple[str, ...]] = ("writer",)
    word: str
    seed: int = 0
    prompt: str = ""

    def prompts(self) -> tuple[str, ...]:
        return (self.prompt,)

    def apply(self, dataset: Dataset, context: OpContext) -> Dataset:
        context.clients["calls"].append(self.word)
        return dataset.map(lambda row: {ANSWER: row[ANSWER] + " " + self.word})


def runner(folder: Path, *, reuse: bool = True, identity: str = "m") -> tuple[StrategyRunner, list[str]]:
    calls: list[str] = []
    context = OpContext(clients={"calls": calls, "writer": ScriptedChat([], identity=identity)})
    cache = Cache(folder, reuse=reuse)
    made = StrategyRunner(cache, lambda step: [Append(word=step.name)], context)
    return made, calls


def test_64_strategies_run_64_steps_or_196(tmp_path: Path) -> None:
    """Every trie node once with prefixes, every step of every strategy without; equal bytes on, off,
    resumed.
    """
    table = rows(PAIRS[:3])
    shared, calls = runner(tmp_path / "a")
    texts = {strategy: shared.run(strategy, table).rows[ANSWER] for strategy in SPACE.all()}
    assert (len(calls), shared.team_runs) == (64, 64)
    plain, plain_calls = runner(tmp_path / "b", reuse=False)
    for strategy, text in texts.items():
        expected = [f"{answer} {' '.join(step.name for step in strategy)}" for _, answer in PAIRS[:3]]
        assert text == expected == plain.run(strategy, table).rows[ANSWER]
    assert len(plain_calls) == 196
    resumed, resumed_calls = runner(tmp_path / "a")
    for strategy in SPACE.all():
        prepared = resumed.run(strategy, table)
        assert prepared.rows[ANSWER] == texts[strategy]
        assert all(step["stored"] for step in prepared.steps)
    assert resumed_calls == []


def test_keys_hold_all_that_changes_a_result(tmp_path: Path) -> None:
    table, strategy = rows(PAIRS[:3]), SPACE.strategy(["clean", "select"])

    def key(
        make: Callable[[Step], DataOp] = lambda step: Append(word=step.name),
        data: Dataset = table,
        model: str = "m",
    ) -> str:
        context = OpContext(clients={"calls": [], "writer": ScriptedChat([], identity=model)})
        return StrategyRunner(Cache(tmp_path), lambda step: [make(step)], context).run(strategy, data).key

    class Newer(Append):
        version: ClassVar[int] = 2

    other = rows([(PAIRS[0][0], PAIRS[0][1] + "."), *PAIRS[1:3]])
    found = [
        key(),
        key(lambda step: Append(word=step.name + "x")),
        key(lambda step: Newer(word=step.name)),
        key(lambda step: Append(word=step.name, prompt="p")),
        key(lambda step: Append(word=step.name, seed=1)),
        key(model="m2"),
        key(data=other),
    ]
    assert len(set(found)) == len(found)
    assert key() == found[0]


def test_a_different_spelling_is_the_same_strategy(tmp_path: Path) -> None:
    """Regression, defect 2: the release keyed its scores by the raw reply."""
    made, calls = runner(tmp_path)
    for spelling in (["clean", "select"], [" Clean", "数据挑选团队"]):
        made.run(SPACE.strategy(spelling), rows(PAIRS[:2]))
    assert calls == ["clean", "select"]


def clean(table: Dataset, model: Path, **options: Any) -> tuple[Dataset, OpContext]:
    context = OpContext()
    for op in clean_ops(str(model), history=HISTORY in table.column_names, **options):
        table = op.run(table, context)
    return table, context


def test_clean_finds_what_was_planted(model_folder: Path) -> None:
    """Duplicates, boilerplate and stubs go, markup is removed; clean rows stay byte for byte."""
    planted = plant(PAIRS, {"markup": 0.1, "boilerplate": 0.1, "duplicate": 0.1, "short": 0.1})
    table = rows([row[:2] for row in planted], kind=[row[2] for row in planted])
    found, context = clean(table, model_folder, min_tokens=20, threshold=0.95)
    kinds = found["kind"]
    assert not {"boilerplate", "short"} & set(kinds)
    assert "<" not in "".join(found[ANSWER])
    assert "@" not in "".join(found[ANSWER])
    # Of a row and its near-copy the first stays, whichever that is.
    assert kinds.count("clean") + kinds.count("duplicate") == 36
    assert set(zip(found[QUESTION], found[ANSWER], strict=True)) <= set(PAIRS) | {
        (q, a) for q, a, kind in planted if kind == "duplicate"
    } | {(q, a) for q, a in zip(found[QUESTION], found[ANSWER], strict=True) if "more" in a}
    dropped = {entry["row_id"] for entry in context.ledger.rows(action="dropped")}
    assert len(found) + len(dropped) == len(table)


def test_clean_keeps_columns_turns_and_text_with_markers(model_folder: Path) -> None:
    """Regression, defect 8."""
    turn = [{"role": "user", "content": "before <b>that</b>"}]
    table = rows(
        [("Question: is this Answer: kept whole here?", "Answer: yes, this text stays whole as it is.")]
    )
    table = table.add_column(HISTORY, [turn]).add_column("source", ["s"])
    found, _ = clean(table, model_folder, min_tokens=1)
    assert found[0][HISTORY] == [{"role": "user", "content": "before that"}]
    assert found[0][ANSWER] == "Answer: yes, this text stays whole as it is."
    assert found[0]["source"] == "s"


def test_chinese_near_duplicates_are_found(model_folder: Path) -> None:
    """Regression, defect 4: split at blanks a whole pair is one token, and its copy has Jaccard 0."""
    long = (
        "子宫内膜癌与缺血性心脏病的发病机制不同子宫内膜癌与雌激素过多有关缺血性心脏病与冠状动脉粥样硬化有关"
    )
    found, _ = clean(
        rows([("问题一", long), ("问题一", long[:-1] + "了"), ("别的问题", "完全不同的一个回答在这里")]),
        model_folder,
        min_tokens=1,
    )
    assert len(found) == 2


def test_odd_characters_are_really_removed(model_folder: Path) -> None:
    """Regression, defect 5: the release threw the replaced text away."""
    found, _ = clean(
        rows([("What is it?", "●▲◆ A list ■ of things that are good to know.")]), model_folder, min_tokens=1
    )
    assert not set("●▲◆■") & set(found[0][ANSWER])


def test_clean_is_idempotent(model_folder: Path) -> None:
    planted = plant(PAIRS, {"markup": 0.2, "duplicate": 0.2})
    once, _ = clean(rows([row[:2] for row in planted]), model_folder, min_tokens=5)
    twice, context = clean(once, model_folder, min_tokens=5)
    assert twice[:] == once[:]
    assert context.ledger.entries == []


def test_row_cells_gives_every_text() -> None:
    table = rows(PAIRS[:1]).add_column(HISTORY, [[{"role": "user", "content": "deep"}]]).add_column("n", [3])
    assert list(row_cells(table)()) == [*PAIRS[0], "user", "deep"]


def test_filters_are_linear() -> None:
    """Regression, defect 15: list membership made every filter of the release quadratic. 8 times the rows may
    cost 24 times at most; quadratic would be 64.
    """

    def seconds(count: int) -> float:
        table = rows([(f"question {i}", f"answer {i}") for i in range(count)])
        held = [rows([(f"question {i}", "x") for i in range(0, count, 2)])]
        start = time.process_time()
        assert len(without_questions(table, held)) == count // 2
        return time.process_time() - start

    seconds(500)
    assert seconds(16000) < 24 * max(seconds(2000), 0.02)


def test_embeddings_may_be_given() -> None:
    sample = take_sample(
        rows(), 0.5, method="centrality", seed=0, embed=lambda texts: np.eye(len(texts), dtype=np.float32)
    )
    assert len(sample) == 30
    assert json.dumps(sample[0])
