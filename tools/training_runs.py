"""Run several mmdet trainings side by side through ``tools/mm.py train``, show how far they are, read what
they logged.

A run that has finished is not run again, and one that was interrupted resumes from its last checkpoint.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DONE = "finished.json"


@dataclass(kw_only=True)
class Training:
    """One run of mmdet's own train.py."""

    name: str
    """Shown to the reader, for example ``student, PKD``."""
    config: str
    """Path of the config, relative to the root of the repository."""
    work_dir: Path
    """Where mmengine writes logs and checkpoints."""
    epochs: int
    """Length of the run."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What ``--cfg-options`` changes in the config."""

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint of a finished run."""
        return self.work_dir / f"epoch_{self.epochs}.pth"

    def overrides(self) -> list[str]:
        """All ``--cfg-options`` of the run."""
        length = {"train_cfg.max_epochs": self.epochs, "param_scheduler.0.total_steps": self.epochs}
        return [f"{key}={value}" for key, value in {**length, **self.options}.items()]

    def is_finished(self) -> bool:
        """Whether this very run (same config, same options) has ended and left its checkpoint."""
        note = self.work_dir / DONE
        if not note.is_file() or not self.checkpoint.is_file():
            return False
        return json.loads(note.read_text())["overrides"] == self.overrides()

    def mark_finished(self) -> None:
        """Note the options next to the checkpoint, so that a change of them starts anew."""
        (self.work_dir / DONE).write_text(json.dumps({"config": self.config, "overrides": self.overrides()}))


def _start(run: Training, *, threads: int) -> subprocess.Popen:
    note = run.work_dir / "started.json"
    same = note.is_file() and json.loads(note.read_text()) == run.overrides()
    if run.work_dir.exists() and not same:
        shutil.rmtree(run.work_dir)
    run.work_dir.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(run.overrides()))
    command = [sys.executable, str(ROOT / "tools" / "mm.py"), "train", run.config]
    command += ["--work-dir", str(run.work_dir), "--resume", "--cfg-options", *run.overrides()]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with (run.work_dir / "console.log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)


def read_scalars(work_dir: Path) -> list[dict[str, Any]]:
    """All lines that mmengine's LocalVisBackend wrote, oldest run first; a cut last line is left out."""
    rows = []
    for path in sorted(work_dir.glob("*/vis_data/scalars.json")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue  # A killed process may leave half a line; the resumed run logs that step again.
    return rows


def validation(work_dir: Path) -> dict[int, dict[str, float]]:
    """Epoch -> the metrics of its validation, names without the ``coco/`` prefix."""
    rows = [row for row in read_scalars(work_dir) if "coco/bbox_mAP" in row]
    return {row["step"]: {key.removeprefix("coco/"): value for key, value in row.items()} for row in rows}


def training_curve(work_dir: Path, key: str) -> dict[int, float]:
    """Iteration -> a logged training value such as ``pkd/r_0``."""
    return {row["step"]: row[key] for row in read_scalars(work_dir) if key in row}


def epoch_of(work_dir: Path) -> float:
    """How many epochs a run has logged so far."""
    return max((row.get("epoch", 0) for row in read_scalars(work_dir)), default=0)


def _tail(path: Path, lines: int = 15) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.is_file() else "(no log)"


def run_side_by_side(
    runs: Sequence[Training], *, threads: int = 1, show: Callable[[str], None], seconds: float = 5.0
) -> None:
    """Train all runs at the same time, one process each, and report once every few seconds.

    Args:
        runs: Trainings that do not need one another.
        threads: Threads of each process.
        show: Called with one line of progress.
        seconds: Time between two lines.

    Raises:
        RuntimeError: If a run fails; the end of its log stands in the message, and the others are stopped.
    """
    waiting = [run for run in runs if not run.is_finished()]
    for run in runs:
        if run not in waiting:
            show(f"{run.name}: finished before, kept")
    processes = {run.name: _start(run, threads=threads) for run in waiting}
    start = time.monotonic()
    try:
        while any(process.poll() is None for process in processes.values()):
            time.sleep(seconds)
            parts = [f"{run.name} epoch {epoch_of(run.work_dir):g}/{run.epochs}" for run in waiting]
            show(f"[{time.monotonic() - start:4.0f} s] " + ", ".join(parts))
            if any(process.poll() not in (None, 0) for process in processes.values()):
                break
        for run in waiting:
            if processes[run.name].poll() not in (None, 0):
                log = run.work_dir / "console.log"
                raise RuntimeError(f"training of {run.name!r} failed; the end of {log}:\n{_tail(log)}")
            run.mark_finished()
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.terminate()
                process.wait(timeout=30)
