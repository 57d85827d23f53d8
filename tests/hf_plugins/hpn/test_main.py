"""The command on real files: search, kill, search again, deploy, picture; one line for wrong input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hf_plugins.hpn.__main__ import main

pytestmark = pytest.mark.host

RECIPE = """
task: synthetic
task_args: {num_clients: 3, dim: 4, num_records: 4, scales: 3}
space:
  learning_rate: {type: categorical, choices: [0.5, 1.0, 2.0]}
  weight_decay: {type: cate, choices: [0.0, 0.3]}
num_rounds: 3
num_steps: %d
save_every: 1
patience: 0
"""


def _recipe(folder: Path, steps: int = 20) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE % steps)
    return path


def _line(capsys: pytest.CaptureFixture) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_search_deploy_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert main(["search", str(_recipe(tmp_path, 40)), "--output-dir", str(out)]) == 0
    found = _line(capsys)
    assert found["rounds_used"] == 43
    assert found["epsilon_encoding"] == pytest.approx(3.0)
    assert found["known_best_found"] >= 1 / 3
    assert main(["deploy", str(out)]) == 0
    deployed = _line(capsys)
    assert deployed["records"] == "test"
    assert deployed["personal"]["mean"] > 0.5
    assert main(["picture", str(out)]) == 0
    assert Path(_line(capsys)["written"]).read_text().startswith("<svg")


def test_method_and_seed_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    args = ["search", str(_recipe(tmp_path)), "--output-dir", str(out), "--method", "random", "--seed", "3"]
    assert main(args) == 0
    assert _line(capsys)["rounds_used"] == 21
    written = json.loads((out / "search.json").read_text())
    assert (written["method"], written["seed"]) == ("random", 3)


def _start(recipe: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "hf_plugins.hpn", "search", str(recipe), "--output-dir", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def test_killed_search_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """SIGKILL in the anchor phase and in the search; configs, policy and log equal an unbroken run's."""
    recipe = _recipe(tmp_path, 60)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(["search", str(recipe), "--output-dir", str(whole)]) == 0
    for wait_for in (broken / "anchor" / "checkpoint.pt", broken / "search.pt"):
        process = _start(recipe, broken)
        deadline = time.monotonic() + 120
        while not wait_for.is_file() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert not (broken / "search.json").is_file()
    assert main(["search", str(recipe), "--output-dir", str(broken)]) == 0
    written = [json.loads((folder / "search.json").read_text()) for folder in (whole, broken)]
    assert written[0]["configs"] == written[1]["configs"]
    states = [torch.load(folder / "search.pt")["searcher"] for folder in (whole, broken)]
    assert all(torch.equal(states[0]["policy"][k], states[1]["policy"][k]) for k in states[0]["policy"])
    assert all(torch.equal(a, b) for a, b in zip(*(s["log"]["parts"] for s in states), strict=True))


def test_wrong_input_is_one_line_and_code_two(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def fails(*args: str) -> str:
        assert main(list(args)) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        return text

    assert "the recipe " in fails("search", str(tmp_path / "none.yaml"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("- 1\n")
    assert "must hold `option: value` lines; it holds list" in fails("search", str(recipe))
    recipe.write_text("rounds: 4\n")
    assert "the recipe has unknown keys rounds; it takes" in fails("search", str(recipe))
    recipe.write_text("num_rounds: 0\n")
    assert "num_rounds must be >= 1; got 0" in fails("search", str(recipe))
    recipe.write_text("space: {}\n")
    assert "the space has no hyper-parameter; name at least one" in fails("search", str(recipe))
    recipe.write_text("space: {lr: {type: cate, choices: [1]}}\n")
    assert "no applier for lr" in fails("search", str(recipe))
    recipe.write_text("a: [\n")
    assert "mmhf hpn search:" in fails("search", str(recipe))
    assert "does not exist; run `mmhf hpn search RECIPE` to its end first" in fails("deploy", str(tmp_path))
