import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from datasets import Dataset

from hf_plugins.data_ops.chat import ScriptedChat
from hf_plugins.data_ops.filters import TextLengthFilter
from hf_plugins.data_ops.mappers import CleanHtmlMapper
from hf_plugins.data_ops.op import (
    ROW_ID,
    DataOp,
    Ledger,
    OpContext,
    canonical,
    content_key,
    digest,
    make_op,
    operators,
    register,
    run_ops,
    with_row_ids,
)


@dataclass(frozen=True, kw_only=True)
class Loses(DataOp):
    """An operator that drops a row and keeps silent."""

    name: ClassVar[str] = "test_loses"
    text_key: str = "text"

    def apply(self, dataset: Dataset, context: OpContext) -> Dataset:
        return dataset.select(range(len(dataset) - 1))


@dataclass(frozen=True, kw_only=True)
class Repeats(DataOp):
    name: ClassVar[str] = "test_repeats"

    def apply(self, dataset: Dataset, context: OpContext) -> Dataset:
        return dataset.select([0, 0])


def texts(*rows: str | None) -> Dataset:
    return Dataset.from_dict({"text": list(rows), "keep": list(range(len(rows)))})


def test_ids_depend_on_content_not_on_place() -> None:
    rows = [{"text": "a"}, {"text": "b"}, {"text": "a"}]
    ids = with_row_ids(Dataset.from_list(rows))[ROW_ID]
    later = with_row_ids(Dataset.from_list([{"text": "c"}, *rows]))[ROW_ID]
    assert list(later)[1:] == list(ids)
    assert len(set(ids)) == 3
    assert list(ids)[2] == list(ids)[0] + "-1"


def test_content_key_follows_every_byte() -> None:
    assert content_key(texts("a", "b")) == content_key(texts("a", "b"))
    assert content_key(texts("a", "b")) != content_key(texts("b", "a"))
    assert content_key(texts("a", "b")) != content_key(texts("a", "c"))
    assert digest("ab", "c") != digest("a", "bc")
    assert canonical({"b": 1, "a": "头"}) == '{"a":"头","b":1}'


def test_fingerprint_follows_name_version_params_clients() -> None:
    op = TextLengthFilter(min_len=1)
    assert op.fingerprint() == TextLengthFilter(min_len=1).fingerprint()
    assert op.fingerprint() != TextLengthFilter(min_len=2).fingerprint()

    class Newer(TextLengthFilter):
        version = 2

    assert op.fingerprint() != Newer(min_len=1).fingerprint()
    scorer = make_op("llm_quality_score_filter")
    keys = {
        scorer.fingerprint(OpContext(clients={"default": ScriptedChat([], identity=name)})) for name in "aab"
    }
    assert len(keys) == 2


def test_account_is_checked() -> None:
    with pytest.raises(
        RuntimeError, match=r"does not account for its rows.*Record each once in context.ledger"
    ):
        Loses().run(texts("a", "b"))
    with pytest.raises(RuntimeError, match="returned a row_id twice"):
        Repeats().run(texts("a"))


def test_missing_column_names_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"no column body; the data set has text, keep"):
        TextLengthFilter(text_key="body").run(texts("a"))


def test_base_classes_say_what_to_write() -> None:
    with pytest.raises(NotImplementedError, match=r"must write apply\(dataset, context\)"):
        DataOp().apply(texts("a"), OpContext())


def test_ledger_round_trip(tmp_path: Path) -> None:
    ledger = Ledger()
    ledger.add("x", "id1", "dropped", "too short", 3.0)
    ledger.add("x", "id2", "changed")
    again = Ledger.load(ledger.save(tmp_path / "l.parquet"))
    assert again.entries == ledger.entries
    assert again.rows(action="dropped") == [
        {"op": "x", "row_id": "id1", "action": "dropped", "reason": "too short", "value": 3.0}
    ]
    assert again.counts() == {("x", "dropped"): 1, ("x", "changed"): 1}
    assert Ledger.load(Ledger().save(tmp_path / "e.parquet")).entries == []
    assert again.rows(op="y") == []


def test_recipes_name_operators() -> None:
    op = make_op({"text_length_filter": {"min_len": 3, "text_key": ["a", "b"]}})
    assert op == TextLengthFilter(min_len=3, text_key=("a", "b"))
    assert make_op(op.spec()) == op
    assert json.loads(json.dumps(op.spec()))
    assert "document_minhash_deduplicator" in operators()
    with pytest.raises(ValueError, match="Did you mean text_length_filter"):
        make_op("text_lenght_filter")
    with pytest.raises(ValueError, match="no operator 'zzz'. There are"):
        make_op("zzz")
    with pytest.raises(ValueError, match="has no parameter minimum; it takes max_len, min_len, text_key"):
        make_op({"text_length_filter": {"minimum": 3}})
    with pytest.raises(ValueError, match="an operator in a recipe is NAME or"):
        make_op({"a": {}, "b": {}})


def test_registry_refuses_bad_names() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Nameless(DataOp):
        pass

    @dataclass(frozen=True, kw_only=True)
    class Taken(DataOp):
        name: ClassVar[str] = "text_length_filter"

    with pytest.raises(ValueError, match="set the class variable name before registering"):
        register(Nameless)
    with pytest.raises(ValueError, match=r"is taken by .*choose another"):
        register(Taken)


def test_missing_client_names_the_role() -> None:
    with pytest.raises(ValueError, match="no client serves that role"):
        OpContext().client("scorer")


def _chain() -> list[DataOp]:
    return [CleanHtmlMapper(), TextLengthFilter(min_len=2)]


def test_stored_chain_equals_plain_chain_and_is_not_run_again(tmp_path: Path, monkeypatch: Any) -> None:
    data = texts("<b>aa</b>", "b", "ccc", None)
    plain, stored, again = OpContext(), OpContext(), OpContext()
    expected = run_ops(data, _chain(), plain)
    first = run_ops(data, _chain(), stored, work_dir=tmp_path)
    assert first.to_list() == expected.to_list()
    assert [row["text"] for row in first] == ["aa", "ccc"]
    assert [row["keep"] for row in first] == [0, 2]
    monkeypatch.setattr(DataOp, "run", None)
    second = run_ops(data, _chain(), again, work_dir=tmp_path)
    assert second.to_list() == expected.to_list()
    assert plain.ledger.entries == stored.ledger.entries == again.ledger.entries
    assert len(list(tmp_path.iterdir())) == 2


def test_half_written_step_is_done_again(tmp_path: Path) -> None:
    data = texts("aa", "b")
    run_ops(data, _chain(), work_dir=tmp_path)
    for ledger in tmp_path.glob("*/ledger.parquet"):
        ledger.unlink()
    for folder in list(tmp_path.iterdir()):
        folder.rename(folder.with_suffix(".part"))
    assert len(run_ops(data, _chain(), work_dir=tmp_path)) == 1


def test_two_writers_of_one_step(tmp_path: Path) -> None:
    from hf_plugins.data_ops.op import _store

    data = with_row_ids(texts("aa"))
    _store(data, Ledger(), tmp_path / "k")
    _store(data, Ledger(), tmp_path / "k")
    assert [p.name for p in tmp_path.iterdir()] == ["k"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "junk").write_text("x")
    with pytest.raises(OSError, match="not empty"):
        _store(data, Ledger(), tmp_path / "other")


def test_empty_data_set_passes() -> None:
    empty = Dataset.from_dict({"text": ["a"], "keep": [0]}).select([])
    assert len(run_ops(empty, _chain())) == 0
