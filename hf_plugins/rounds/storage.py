"""Checkpoints of a run: one file, written beside and renamed; a kill leaves the old one or the new one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_plugins.whole_files import replacing, write_text

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
_VERSION = 1


def save_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the state of a run: tensors and plain values only.

    Args:
        folder: Folder of the run.
        state: What `load_checkpoint` shall give back.
    """
    with replacing(folder / CHECKPOINT) as part, part.open("wb") as file:
        torch.save({"version": _VERSION, **state}, file)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The last state of a run, or None if it has none yet.

    Raises:
        ValueError: If the file is no checkpoint of this version.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        return None
    state = torch.load(path, weights_only=True, map_location="cpu")
    if not isinstance(state, dict) or state.get("version") != _VERSION:
        raise ValueError(
            f"{path} is no checkpoint of version {_VERSION}; take the suite that wrote it, or another folder."
        )
    return state


def check_same_settings(saved: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with a run under other settings than it began with.

    Raises:
        ValueError: If any setting differs; names them all.
    """
    plain_now = json.loads(json.dumps(dict(now)))
    plain_saved = json.loads(json.dumps(dict(saved)))
    changed = [
        f"{name}: {plain_saved.get(name)!r} then, {plain_now.get(name)!r} now"
        for name in sorted(set(plain_saved) | set(plain_now))
        if plain_saved.get(name) != plain_now.get(name)
    ]
    if changed:
        raise ValueError(
            f"{folder} holds a run with other settings ({'; '.join(changed)}). "
            "Restore them, or give the new run a folder of its own."
        )


def write_metrics(folder: Path, history: list[dict[str, Any]]) -> None:
    """All rounds so far as JSON lines."""
    text = "".join(json.dumps(row) + "\n" for row in history)
    write_text(folder / METRICS, text)
