"""Runs side by side: progress, failure, resume, reading of logs.

The trained process is a stand-in that only logs; real trainings are in tests/mm_plugins.
"""

import json
import sys
from pathlib import Path

import pytest

from tools import training_runs
from tools.training_runs import Training, run_side_by_side


def _write_log(work_dir: Path, rows: list[dict], tail: str = "") -> None:
    folder = work_dir / "20260101" / "vis_data"
    folder.mkdir(parents=True)
    (folder / "scalars.json").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def test_scalars_are_read_and_a_cut_line_left_out(tmp_path: Path) -> None:
    rows = [
        {"epoch": 1, "step": 13, "pkd/r_0": 0.5},
        {"coco/bbox_mAP": 0.25, "step": 2},
        {"epoch": 2, "step": 26, "pkd/r_0": 0.75},
    ]
    _write_log(tmp_path, rows, tail='{"epoch": 3, "st')
    assert training_runs.training_curve(tmp_path, "pkd/r_0") == {13: 0.5, 26: 0.75}
    assert training_runs.validation(tmp_path)[2]["bbox_mAP"] == 0.25
    assert training_runs.epoch_of(tmp_path) == 2


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # noqa: ANN201
    """Make `_start` run a small script instead of a training; returns how many times it started."""
    started: list[str] = []

    def start(run: Training, *, threads: int) -> object:
        started.append(run.name)
        run.work_dir.mkdir(parents=True, exist_ok=True)
        script = "import sys; print('the reason'); sys.exit(3)" if run.name == "bad" else "pass"
        log = (run.work_dir / "console.log").open("w")
        run.checkpoint.write_text("weights")
        return training_runs.subprocess.Popen([sys.executable, "-c", script], stdout=log, stderr=log)

    monkeypatch.setattr(training_runs, "_start", start)
    return started


def test_finished_run_is_kept_and_a_changed_one_is_not(train: list[str], tmp_path: Path) -> None:
    run = Training(name="good", config="x.py", work_dir=tmp_path / "good", epochs=2)
    lines: list[str] = []
    run_side_by_side([run], show=lines.append, seconds=0.05)
    run_side_by_side([run], show=lines.append, seconds=0.05)
    assert train == ["good"]
    assert "kept" in lines[-1]
    changed = Training(
        name="good", config="x.py", work_dir=run.work_dir, epochs=2, options={"randomness.seed": 1}
    )
    assert not changed.is_finished()


def test_failed_run_shows_the_end_of_its_log(train: list[str], tmp_path: Path) -> None:
    runs = [
        Training(name=name, config="x.py", work_dir=tmp_path / name, epochs=2) for name in ("good", "bad")
    ]
    with pytest.raises(RuntimeError, match="training of 'bad' failed(.|\n)*the reason"):
        run_side_by_side(runs, show=lambda line: None, seconds=0.05)
    assert not runs[1].is_finished()
