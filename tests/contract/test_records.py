"""Style guide (c6) and rule 5: what was measured says how, with which versions, seeds and machine."""

import json
from pathlib import Path

import pytest

from tests.contract.rooms import ROOT, label

RESULTS = sorted((ROOT / "docs" / "results").glob("*.json"))
NEEDED = {"name", "command", "config", "versions", "seeds", "hardware", "table"}


@pytest.mark.parametrize("path", RESULTS, ids=label)
def test_result_file_can_be_repeated(path: Path) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    assert set(record) >= NEEDED, f"{path.name} lacks {sorted(NEEDED - set(record))}"
    assert record["name"] == path.stem
    columns = record["table"]["columns"]
    assert all(len(row) == len(columns) for row in record["table"]["rows"])


def test_generated_parts_of_the_docs_are_current() -> None:
    from tools.make_docs import stale_files

    assert stale_files(ROOT) == [], "run `make docs`"


def test_tracked_text_names_no_machine() -> None:
    """Paths of a machine in a tracked file break everywhere else."""
    suffixes = {".py", ".md", ".cfg", ".toml", ".yaml", ".yml", ".json", ".sh", ".txt"}
    folders = ("mm_plugins", "hf_plugins", "configs", "tools", "benchmarks", "docs", ".ci")
    guilty = [
        label(path)
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in suffixes and str(ROOT) + "/" in path.read_text(encoding="utf-8")
    ]
    assert not guilty
