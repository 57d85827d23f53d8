"""Files that are whole or not there."""

import json
import os
import resource
from pathlib import Path

import pytest
import torch

from hf_plugins.whole_files import replacing, write_json, write_text


def test_folders_are_made_and_nothing_else_stays(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "er" / "x.txt", "old")
    write_text(str(tmp_path / "deep" / "er" / "x.txt"), "new")
    assert [path.name for path in (tmp_path / "deep" / "er").iterdir()] == ["x.txt"]
    assert (tmp_path / "deep" / "er" / "x.txt").read_text() == "new"


def test_readers_see_the_old_content_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    with replacing(path) as part:
        part.write_text("half")
        assert path.read_text() == "old"
        assert part.parent == path.parent
    assert path.read_text() == "half"


def test_an_error_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(TypeError, match="unsupported operand"), replacing(path) as part:
        part.write_text("half") + "x"
    assert [found.name for found in tmp_path.iterdir()] == ["x"]
    assert path.read_text() == "old"


def test_writers_at_the_same_time_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with replacing(path) as first:
        first.write_text("first")
        with replacing(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"


@pytest.mark.parametrize("sync", [True, False])
def test_content_is_on_the_disk_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: bool
) -> None:
    path, seen = tmp_path / "x", []
    monkeypatch.setattr(os, "fsync", lambda handle: seen.append((os.fstat(handle).st_size, path.exists())))
    with replacing(path, sync=sync) as part:
        part.write_text("five5")
    assert seen == ([(5, False)] if sync else [])


def test_secrets_are_private_from_the_first_byte(tmp_path: Path) -> None:
    with replacing(tmp_path / "x", private=True) as part:
        assert part.stat().st_mode & 0o777 == 0o600
        part.write_text("secret")
    write_json(tmp_path / "y", {"seed": 1}, private=True)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "xy"] == [0o600, 0o600]


def test_a_full_disk_says_so(tmp_path: Path) -> None:
    """torch.save's own complaint is of positions in an archive; the system's error is what helps."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Stands for a full disk; the number of the error is another one.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
    try:
        with (
            pytest.raises(OSError, match="too large"),
            replacing(tmp_path / "x") as part,
            part.open("wb") as file,
        ):
            torch.save(torch.zeros(10_000), file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_json_keeps_every_text(tmp_path: Path) -> None:
    """A file's name that is no UTF-8 reaches Python as half of a pair of surrogates."""
    value = {"a": "\u60a3\u8005 \u00e9", "b": [1.5, None], "c": "x\udc80\\y"}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "\u60a3\u8005" in text
    assert text.endswith("}\n")
