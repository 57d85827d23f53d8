import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_plugins.dpf_cm.__main__ import main
from tests.hf_plugins.dpf_cm.memorised import BENIGN, LOOKALIKE, PRIVATE, model, tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    model().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    rows = [{"id": s.id, "prompt": s.prompt, "answer": s.answer} for s in PRIVATE]
    (folder / "s.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "b.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in BENIGN + LOOKALIKE))
    (folder / "few.txt").write_text("\n".join(BENIGN[:4]), encoding="utf-8")
    return folder


def run(place: Path, *words: Any) -> int:
    return main(["ppvd", *(str(place / w[1:]) if str(w).startswith("@") else str(w) for w in words)])


@pytest.mark.host
def test_guard_from_search_to_forget(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, "key", "@key") == 0
    assert (place / "key").stat().st_mode & 0o777 == 0o600
    assert run(place, "search", "@model", "--samples", "@s.jsonl", "--out", "@risky.jsonl") == 0
    assert "8 of 8 samples are memorised" in capsys.readouterr().out
    options = [
        "--samples",
        "@risky.jsonl",
        "--benign",
        "@b.jsonl",
        "--safe-reply",
        "请咨询医生。",
        "--key-file",
        "@key",
    ]
    build = [
        *options,
        "--protect",
        "encrypt",
        "--store",
        "numpy",
        "--key-points",
        "0,0.5",
        "--whiten",
        "true",
        "--ngram",
        "8",
    ]
    assert run(place, "build", "@model", "@guard", *build) == 0
    meta = json.loads((place / "guard" / "ppvd.json").read_text())
    assert meta["config"]["key_points"] == [0.0, 0.5]
    assert meta["config"]["ngram"] == 8
    key = ["--key-file", "@key"]
    assert (
        run(
            place,
            "attack",
            "@model",
            "@guard",
            "--samples",
            "@risky.jsonl",
            "--benign",
            "@few.txt",
            "--out",
            "@report",
            *key,
        )
        == 0
    )
    assert "question: ROUGE-L 1.000 -> " in capsys.readouterr().out
    assert json.loads((place / "report" / "report.json").read_text())["attacks"][0]["matched"] == 1.0
    assert (place / "report" / "report.html").is_file()
    assert run(place, "forget", "@model", "@guard", "p1", "p2", *key) == 0
    assert "2 of 2 samples erased, 6 left" in capsys.readouterr().out
    (place / "new.jsonl").write_text(
        json.dumps({"id": "p1", "prompt": PRIVATE[1].prompt, "answer": PRIVATE[1].answer})
    )
    assert run(place, "add", "@model", "@guard", "--samples", "@new.jsonl", *key) == 2
    assert "give `safe` in each row, or --safe-reply TEXT" in capsys.readouterr().err
    assert run(place, "add", "@model", "@guard", "--samples", "@new.jsonl", "--safe-reply", "x", *key) == 0
    assert "7 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["search", "@none", "--samples", "@s.jsonl", "--out", "@o"], "no model in"),
        (["search", "@model", "--samples", "@gone.jsonl", "--out", "@o"], "No such file"),
        (
            ["search", "@model", "--samples", "@bad.jsonl", "--out", "@o"],
            "bad.jsonl:1.*: no JSON. One object a line",
        ),
        (
            ["search", "@model", "--samples", "@list.jsonl", "--out", "@o"],
            "a line must be an object with prompt and answer",
        ),
        (["search", "@model", "--samples", "@half.jsonl", "--out", "@o"], "row 1.* lacks prompt"),
        (
            ["build", "@model", "@g", "--samples", "@s.jsonl", "--benign", "@half2.jsonl"],
            "every row needs a text under prompt",
        ),
        (
            ["build", "@model", "@g", "--samples", "@s.jsonl", "--benign", "@b.jsonl"],
            "some samples have no safe answer",
        ),
        (
            ["build", "@model", "@g", "--samples", "@s.jsonl", "--benign", "@b.jsonl", "--ngram", "x"],
            "is no value of type",
        ),
        (
            ["build", "@model", "@g", "--samples", "@s.jsonl", "--benign", "@b.jsonl", "--whiten", "maybe"],
            "--whiten: 'maybe'",
        ),
        (
            [
                "build",
                "@model",
                "@g",
                "--samples",
                "@s.jsonl",
                "--benign",
                "@few.txt",
                "--safe-reply",
                "x",
                "--protect",
                "sketch",
            ],
            "needs a key of 32 bytes",
        ),
        (["forget", "@model", "@g", "a"], "build one with"),
        (["key", "@s.jsonl"], "File exists"),
    ],
)
def test_bad_input_is_one_line_and_code_two(
    words: list[str], match: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "bad.jsonl").write_text("{x\n")
    (place / "list.jsonl").write_text("[1]\n")
    (place / "half.jsonl").write_text('{"prompt": "a"}\n')
    (place / "half2.jsonl").write_text('{"answer": "a"}\n')
    assert run(place, *words) == 2
    err = capsys.readouterr().err
    assert re.search(match, err)
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1


def test_operators_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ops"]) == 0
    out = capsys.readouterr().out
    assert "document_minhash_deduplicator(text_key='text'" in out
    assert "chained_instruction_mapper(" in out


def test_wrong_recipe_is_code_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text("nothing: 1")
    assert main(["run", str(tmp_path / "r.yaml")]) == 2
    assert "no option nothing" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "none.yaml")]) == 2
    with pytest.raises(SystemExit, match="2"):
        main(["fly"])


@pytest.mark.host
def test_data_stage_under_two_processes(tmp_path: Path) -> None:
    """The first process does the work, the second takes the stored rows; one result, one ledger."""
    rows = [{"question": f"问题{i}是什么意思呢？", "answer": f"回答{i}就是这个意思。"} for i in range(20)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "r.yaml").write_text("work_dir: o\nsft_sources: [{files: [d.jsonl]}]\n")
    words = [
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "2",
        "--cpu",
        "--main_process_port",
        "0",
        "-m",
        "hf_plugins.dpf_cm",
    ]
    done = subprocess.run(
        [sys.executable, *words, "run", str(tmp_path / "r.yaml"), "--stage", "sft_data"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "o" / "run.json").read_text())["results"]
    assert results["sft_data"]["rows"] <= 20
    assert not list((tmp_path / "o" / "data").glob("*.part"))
