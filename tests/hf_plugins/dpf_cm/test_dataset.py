import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from hf_plugins.data_ops import Ledger, OpContext, ScriptedChat
from hf_plugins.dpf_cm.dataset import ChainedInstructionMapper, Malformed, pair_rows, read_sources, sft_rows


def write(folder: Path, rows: list[Any], name: str = "d.jsonl") -> str:
    text = "".join(
        (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows
    )
    data = text.encode("utf-8", "surrogatepass")
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return name


def read(folder: Path, rows: list[Any], form: str = "qa", **more: Any) -> tuple[Dataset, list[str]]:
    ledger = Ledger()
    limit = more.pop("max_row_bytes", 1_000_000)
    source = {"files": [write(folder, rows)], "format": form, **more}
    found = read_sources([source], base=folder, ledger=ledger, max_row_bytes=limit)
    return found, [f"{row['row_id']} {row['reason']}" for row in ledger.rows()]


def test_forms_become_one(tmp_path: Path) -> None:
    turns = [
        {"from": r, "value": v}
        for r, v in (("system", "S"), ("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"))
    ]
    data, bad = read(tmp_path, [{"conversations": turns}], "sharegpt")
    expected = {
        "question": "c", "answer": "d", "instruction": "S",
        "history": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    }  # fmt: skip
    assert bad == []
    assert {k: data[0][k] for k in expected} == expected
    alpaca = {"instruction": "c", "input": "x", "output": "d", "history": [["a", "b"]]}
    data, _ = read(tmp_path, [alpaca], "alpaca")
    assert data[0]["question"] == "c\nx"
    assert data[0]["history"] == expected["history"]
    data, _ = read(tmp_path, [{"ask": "q", "answer": "a"}], "qa", keys={"question": "ask"}, name="n")
    assert (data[0]["question"], data[0]["source"], data[0]["history"]) == ("q", "n", [])
    data, _ = read(
        tmp_path, [{"prompt": "p", "chosen": {"from": "gpt", "value": "c"}, "rejected": "r"}], "preference"
    )
    assert (data[0]["prompt"], data[0]["chosen"], data[0]["rejected"]) == ("p", "c", "r")
    two = {"conversations": turns[1:4], "chosen": {"value": "x"}, "rejected": {"value": "y"}}
    data, _ = read(tmp_path, [two], "preference")
    assert (data[0]["prompt"], len(data[0]["history"])) == ("c", 2)
    (tmp_path / "t.txt").write_text("一\n\n二\n", encoding="utf-8")
    found = read_sources([{"files": ["t.txt"], "format": "text"}], base=tmp_path)
    assert list(found["text"]) == ["一", "二"]


def test_bad_rows_are_recorded_with_place_and_reason(tmp_path: Path) -> None:
    rows = [
        {"question": "q", "answer": "a"},
        "{no json",
        [1],
        {"question": "q"},
        {"question": "q", "answer": "  "},
        {"question": 3, "answer": "a"},
        '{"question": "\\ud800", "answer": "a"}',
        {"question": "q", "answer": "x" * 300},
        "",
        {"question": "r", "answer": "b"},
    ]
    data, bad = read(tmp_path, rows, max_row_bytes=200)
    assert list(data["question"]) == ["q", "r"]
    expected = [
        "d.jsonl:2 no JSON",
        "d.jsonl:3 the row is no JSON object",
        "d.jsonl:4 .*no text under .*'answer'",
        "d.jsonl:5 empty 'answer'",
        "d.jsonl:6 no text under 'question'",
        "d.jsonl:7 .*half a surrogate pair under .*'question'",
        "d.jsonl:8 row of 332 bytes is longer than max_row_bytes=200",
    ]
    assert len(bad) == len(expected)
    assert all(re.fullmatch(a, b) for a, b in zip(expected, bad, strict=True))


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "conversations must be a list of turns"),
        (["x"], "a turn is no object"),
        ([{"from": "robot", "value": "x"}], "unknown role .*'robot'"),
        ([{"from": "human", "value": "x"}], "user and assistant must take turns, the assistant last"),
        ([{"from": "human", "value": "x"}] * 2, "must take turns"),
        ([{"from": "gpt", "value": "x"}, {"from": "human", "value": "x"}], "must take turns"),
        ([{"from": "human", "value": "x"}, {"from": "gpt", "value": ""}], "empty 'value'"),
    ],
)
def test_malformed_dialogues(turns: list[Any], reason: str, tmp_path: Path) -> None:
    good = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]
    data, bad = read(tmp_path, [{"conversations": turns}, {"conversations": good}], "sharegpt")
    assert len(data) == 1
    assert re.search(reason, bad[0])


def test_malformed_pairs_and_histories(tmp_path: Path) -> None:
    equal = {"prompt": "p", "chosen": "c", "rejected": "c"}
    ends = {
        "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}],
        "chosen": "c",
        "rejected": "r",
    }
    good = {"prompt": "p", "chosen": "c", "rejected": "r"}
    _, bad = read(tmp_path, [equal, ends, good], "preference")
    assert "chosen and rejected are equal" in bad[0]
    assert re.search("the .*prompt must .*end with the user's turn", bad[1])
    rows = [{"instruction": "i", "output": "o", "history": [["a"]]}, {"instruction": "i", "output": "o"}]
    _, bad = read(tmp_path, rows, "alpaca")
    assert "history must hold pairs of texts" in bad[0]
    assert issubclass(Malformed, ValueError)


def test_encodings(tmp_path: Path) -> None:
    """A file in gb18030 among UTF-8 ones: its rows are recorded, and read once the source says so."""
    row = json.dumps({"question": "头痛", "answer": "休息"}, ensure_ascii=False)
    (tmp_path / "gb.jsonl").write_bytes((row + "\n").encode("gb18030"))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + row.encode() + b"\r\n")
    ledger = Ledger()
    data = read_sources([{"files": ["gb.jsonl", "bom.jsonl"]}], base=tmp_path, ledger=ledger)
    assert len(data) == 1
    assert "not utf-8: byte 0x" in ledger.rows()[0]["reason"]
    assert "set the source's encoding" in ledger.rows()[0]["reason"]
    again = read_sources([{"files": ["gb.jsonl"], "encoding": "gb18030"}], base=tmp_path)
    assert again[0]["question"] == "头痛"


@pytest.mark.slow
def test_a_row_of_100_megabytes_never_comes_into_memory(tmp_path: Path) -> None:
    import resource

    with (tmp_path / "big.jsonl").open("w") as file:
        file.write('{"question": "q", "answer": "')
        for _ in range(100):
            file.write("x" * 1_000_000)
        file.write('"}\n{"question": "q", "answer": "a"}\n')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ledger = Ledger()
    data = read_sources([{"files": ["big.jsonl"]}], base=tmp_path, ledger=ledger)
    assert len(data) == 1
    # 29 before the text, two after it, and the end of the line.
    assert "row of 100000032 bytes" in ledger.rows()[0]["reason"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_limit_and_gz(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": "a"} for i in range(5)]
    write(tmp_path, rows, "d.jsonl.gz")
    assert len(read_sources([{"files": ["d.jsonl.gz"], "limit": 3}], base=tmp_path)) == 3


def test_wrong_sources(tmp_path: Path) -> None:
    name = write(tmp_path, [{"question": "q", "answer": "a"}])
    for source, match in (
        ({}, r"a source needs files: \[...\]"),
        ({"files": [name], "kind": "qa"}, "a source has no .*kind; it takes encoding, files, format"),
        ({"files": [name], "format": "csv"}, "format must be one of .*text, qa"),
        (
            {"files": [name], "format": "text"},
            r"no row could be read \(no text under 'text'.*\). Check format and keys",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            read_sources([source], base=tmp_path)
    with pytest.raises(FileNotFoundError, match="paths in a recipe start from the recipe's folder"):
        read_sources([{"files": ["none.jsonl"]}], base=tmp_path)
    text = write(tmp_path, [{"text": "t"}], "t.jsonl")
    with pytest.raises(ValueError, match="must hold one kind of row"):
        read_sources([{"files": [name]}, {"files": [text], "format": "text"}], base=tmp_path)


def _seeds(folder: Path, scores: list[float]) -> str:
    rows = [
        {"id": f"s{i}", "question": f"问{i}", "instruction": f"指令{i}", "score": s}
        for i, s in enumerate(scores)
    ]
    return str(folder / write(folder, rows, "seeds.jsonl"))


def test_chained_instructions(tmp_path: Path) -> None:
    client = ScriptedChat(
        lambda m: f"<think>x</think>写给{m[1]['content'].rsplit('问题：', 1)[1].splitlines()[0]}"
    )
    context = OpContext(clients={"instructor": client})
    data = Dataset.from_dict({"question": ["头痛", "咳嗽", None], "instruction": [None, "有了", None]})
    op = ChainedInstructionMapper(seeds_file=_seeds(tmp_path, [0.9, 0.2, 0.5, 0.6]))
    out = op.run(data, context)
    assert list(out["instruction"]) == ["写给头痛", "有了", None]
    assert len(out[0]["example_ids"].split(",")) == 3
    assert out[1]["example_ids"] is None
    # The best example stands last in the prompt.
    text = client.requests[0][1]["content"]
    used = out[0]["example_ids"].split(",")
    places = [text.index(f"指令{name[1:]}") for name in used]
    assert places == sorted(places)
    assert list(op.run(data, context)["example_ids"]) == list(out["example_ids"])
    silent = OpContext(clients={"instructor": ScriptedChat(lambda m: " ")})
    assert list(op.run(data, silent)["instruction"]) == [None, "有了", None]
    assert silent.ledger.rows()[0]["reason"] == "unparsed: empty instruction"


def test_wrong_chains(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_examples must be >= 1; got 0"):
        ChainedInstructionMapper(seeds_file="x", num_examples=0)
    with pytest.raises(ValueError, match=r"order must be chain, asc \(plain few-shot\) or desc"):
        ChainedInstructionMapper(seeds_file="x", order="up")
    op = ChainedInstructionMapper(seeds_file=_seeds(tmp_path, [0.5, 0.5, 0.5]))
    with pytest.raises(ValueError, match="lower num_examples or score more seeds"):
        op.run(
            Dataset.from_dict({"question": ["q"]}),
            OpContext(clients={"default": ScriptedChat(lambda m: "x")}),
        )


def test_rows_for_trl(tmp_path: Path) -> None:
    data, _ = read(tmp_path, [{"instruction": "c", "output": "d", "history": [["a", "b"]]}], "alpaca")
    row = sft_rows(data)[0]
    assert [m["role"] for m in row["prompt"]] == ["user", "assistant", "user"]
    assert row["completion"] == [{"role": "assistant", "content": "d"}]
    data, _ = read(tmp_path, [{"question": "q", "answer": "a", "instruction": "S"}])
    assert sft_rows(data)[0]["prompt"][0] == {"role": "system", "content": "S"}
    data, _ = read(tmp_path, [{"prompt": "p", "chosen": "c", "rejected": "r"}], "preference")
    row = pair_rows(data)[0]
    assert row["prompt"] == [{"role": "user", "content": "p"}]
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("c", "r")
