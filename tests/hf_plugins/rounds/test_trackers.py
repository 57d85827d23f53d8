"""Rows of a run reach the trackers that transformers knows."""

from pathlib import Path

import pytest

from hf_plugins.rounds.trackers import Reporter

pytestmark = pytest.mark.host


def test_unknown_tracker_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="notatracker"):
        Reporter(["notatracker"], str(tmp_path))


def test_no_tracker_is_no_work(tmp_path: Path) -> None:
    reporter = Reporter([], str(tmp_path))
    reporter({"round": 1, "x": 0.5})
    reporter.close()
    assert reporter.state.global_step == 1
