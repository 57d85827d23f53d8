import importlib.util
import json
import pkgutil
import re
from pathlib import Path

import pytest
import yaml

import hf_plugins.autodp
from hf_plugins.autodp import strategy as room
from hf_plugins.autodp.__main__ import main
from tests.contract.rooms import ROOT
from tests.hf_plugins.autodp.test_strategy import longest
from tests.hf_plugins.autodp.tiny import PAIRS, by_table, write_jsonl


@pytest.fixture
def words(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A search by table of rows of which a third are stubs."""
    monkeypatch.setattr(room, "evaluate", by_table(longest))
    data = write_jsonl(
        tmp_path / "x.jsonl",
        [{"question": q, "answer": "stub" if i % 3 == 0 else a} for i, (q, a) in enumerate(PAIRS)],
    )
    recipe = {"metric": "loss", "search": "exhaustive", "num_dev": 10, "num_test": 10, "num_anchors": 4}
    recipe |= {
        "sample_ratio": 1.0,
        "min_tokens": 20,
        "lora_r": 2,
        "less_checkpoints": 1,
        "projection_dim": 32,
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe | {"model": str(model_folder)}))
    return ["search", str(data), "--config", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run")]


def test_search_report_and_apply(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "chosen: clean (" in out
    assert "round 1] clean: +0." in out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["chosen"] == ["clean"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Search tree" in page
    (tmp_path / "run" / "report.html").unlink()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report.html").read_text() == page
    capsys.readouterr()
    applied = ["apply", str(tmp_path / "run" / "recipe.yaml"), words[1], "--out", str(tmp_path / "all")]
    assert main(applied) == 0
    assert "rows.jsonl" in capsys.readouterr().out
    rows = (tmp_path / "all" / "rows.jsonl").read_text().splitlines()
    # 40 of 60 rows are no stubs, and some of those are near-copies of others.
    assert 0 < len(rows) <= 40
    assert not any("stub" in row for row in rows)


def test_no_strategy_wins_is_exit_code_1(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "evaluate", by_table(lambda _: 0.0))
    assert main([*words, "--search", "random", "--num-strategies", "1"]) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sample-ratio", "20"], "It is a share"),
        (["--num-dev", "50"], "lower num_dev, num_test or num_anchors"),
        (["--search", "random", "--num-strategies", "9"], "use search='exhaustive' for all"),
        (["--question", "ask"], "the rows have no column "),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], more: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main([*words, *more]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_missing_pieces(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.yaml").write_text("serach: agent")
    (tmp_path / "list.yaml").write_text("- 1")
    for given, message in (
        (["search", "--metric", "loss"], "data must be given"),
        (["search", "x.jsonl", "--metric", "loss"], "model must be given"),
        (
            ["search", "x.jsonl", "--config", str(tmp_path / "no.yaml")],
            "configs/ holds some to start from",
        ),
        (["search", "x.jsonl", "--config", str(tmp_path / "bad.yaml")], "the recipe has unknown keys "),
        (["search", "x.jsonl", "--config", str(tmp_path / "list.yaml")], "must hold `option: value` lines"),
        (["report", str(tmp_path)], "writes it when it is done"),
        (["apply", str(tmp_path / "r.yaml"), "x", "--out", str(tmp_path)], "no recipe"),
        (["evaluate", str(tmp_path / "job.json")], "job.json"),
    ):
        assert main(given) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["search", "x.jsonl", "--metric", "loss"]) == 2
    assert "start a search as one process" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "autodp").glob("*.yaml")), ids=lambda p: p.stem)
def test_ready_recipes_are_valid(path: Path) -> None:
    from hf_plugins.autodp.config import AutoDPConfig

    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name in ("data", "model", "dev", "test", "anchors"):
        values.pop(name, None)
    AutoDPConfig(**values)


def test_every_module_imports_and_every_path_of_the_readme_is_there() -> None:
    """Regression, defect 1: the release imports a module and names paths in its README that are not there."""
    names = [module.name for module in pkgutil.iter_modules(hf_plugins.autodp.__path__, "hf_plugins.autodp.")]
    assert "hf_plugins.autodp.strategy" in names
    for name in names:
        importlib.import_module(name)
    text = (ROOT / "hf_plugins" / "autodp" / "README.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"\b(?:configs|benchmarks|hf_plugins|docs|tests)/[\w/.]*\w", text))
    assert "configs/autodp/halving_loss.yaml" in paths
    modules = re.findall(r"-m ((?:hf_plugins|benchmarks)\.[\w.]*\w)", text)
    assert modules
    missing = [path for path in sorted(paths) if not (ROOT / path).exists()]
    assert not missing
    assert all(importlib.util.find_spec(name) for name in modules)
