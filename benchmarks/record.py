"""Write what a benchmark measured: one JSON file with all that is needed to repeat it, placed at once."""

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"


def hardware() -> str:
    """The machine in one line: cores, architecture, memory, and the accelerator if PyTorch sees one."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    text = f"{os.cpu_count()} CPU cores ({platform.machine()}), {memory:.0f} GiB"
    import torch

    return f"{text}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else f"{text}, no GPU"


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of the named packages, the suite's own first."""
    return {name: metadata.version(name) for name in ("mmhf-plugins", "torch", *packages)}


def commit() -> str:
    """Short hash of the checkout's commit, a plus sign behind it if code differs; ``unknown`` outside git."""
    git = ("git", "-C", str(RESULTS.parent.parent))
    try:
        hash_ = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return hash_.stdout.strip() + ("+" if changed else "")


def spread(values: Sequence[float]) -> str:
    """Median with the smallest and largest value: ``1.23 (1.10-1.40)``."""
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def write_result(
    name: str,
    *,
    command: str,
    config: Mapping[str, Any],
    seeds: Sequence[int],
    packages: Sequence[str],
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    notes: Sequence[str] = (),
    details: Mapping[str, Any] | None = None,
    folder: Path = RESULTS,
) -> Path:
    """Write ``docs/results/NAME.json``: a table for the docs and the raw figures behind it.

    Args:
        name: File name without ending; also the marker's name in the docs.
        command: The command line that repeats the measurement.
        config: All settings of the run.
        seeds: Seeds of the run.
        packages: Packages whose versions matter besides torch.
        columns: Head of the table in the docs.
        rows: Rows of the table, each as long as ``columns``.
        notes: Sentences printed below the table.
        details: Raw figures.
        folder: Where to write.

    Returns:
        The path written.
    """
    record = {
        "name": name,
        "command": command,
        "config": dict(config),
        "seeds": list(seeds),
        "versions": versions(*packages),
        "hardware": hardware(),
        "commit": commit(),
        "table": {"columns": list(columns), "rows": [list(row) for row in rows]},
        "notes": list(notes),
        "details": dict(details or {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    return path
