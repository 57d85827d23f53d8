"""Files of a run: whole or not at all."""

import resource
from pathlib import Path

import pytest
import torch

from hf_plugins.rounds.storage import (
    check_same_settings,
    load_checkpoint,
    save_checkpoint,
    write_metrics,
)


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path / "run", {"vector": torch.arange(3.0), "history": [{"a": 1.5}]})
    state = load_checkpoint(tmp_path / "run")
    assert state is not None
    assert state["vector"].tolist() == [0, 1, 2]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoint.pt"]


def test_half_written_file_is_ignored(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"round_index": 1})
    (tmp_path / ".checkpoint.pt.0123456789ab.part").write_bytes(b"half")
    state = load_checkpoint(tmp_path)
    assert state is not None
    assert state["round_index"] == 1


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"round_index": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Stands for a full disk; the number of the error is another one.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            save_checkpoint(tmp_path, {"round_index": 2, "vector": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    state = load_checkpoint(tmp_path)
    assert state is not None
    assert state["round_index"] == 1


def test_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save({"version": 99}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="; take the suite that wrote it, or another folder"):
        load_checkpoint(tmp_path)


def test_settings_must_agree(tmp_path: Path) -> None:
    check_same_settings({"a": (1, 2)}, {"a": [1, 2]}, tmp_path)
    with pytest.raises(ValueError, match="give the new run a folder of its own"):
        check_same_settings({"a": 1}, {"a": 2, "b": 0}, tmp_path)


def test_metrics(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"round": 1}, {"round": 2}])
    assert (tmp_path / "metrics.jsonl").read_text() == '{"round": 1}\n{"round": 2}\n'
