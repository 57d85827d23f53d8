"""``flwr run`` for real: a SuperLink with two SuperNodes on loopback, and Flower's simulation runtime."""

import json
import time
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("flwr")

from hf_plugins.dp_fedavg.__main__ import main  # noqa: E402
from tests.hf_plugins.dp_fedavg.deployment import deployment  # noqa: E402
from tests.hf_plugins.dp_fedavg.tiny import DATA, RECIPE  # noqa: E402

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.real]


def in_process(folder: Path, **changes: object) -> Path:
    """The same recipe without Flower."""
    content = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    content |= {"data": str(DATA), "output_dir": str(folder / "here"), "evaluate_every": 5, **changes}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    assert main(["run", str(path)]) == 0
    return folder / "here"


def same_result(one: Path, other: Path) -> None:
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (one, other)]
    assert torch.equal(states[0]["vector_D"], states[1]["vector_D"])
    assert states[0]["stateful"] == states[1]["stateful"]
    reports = [json.loads((folder / "report.json").read_text()) for folder in (one, other)]
    assert reports[0]["epsilon"] == reports[1]["epsilon"]
    assert reports[0]["test/accuracy"] == reports[1]["test/accuracy"]


def run_app(folder: Path, *, simulation: bool) -> Path:
    """Four users on two nodes, two rounds; every process is real and listens on 127.0.0.1 only."""
    overrides = {"data": str(DATA), "output-dir": str(folder / "out"), "num-rounds": 2, "num-clients": 4}
    report = folder / "out" / "report.json"
    with deployment(folder, simulation=simulation) as federation:
        done = federation.run_app(overrides, timeout=500)
        deadline = time.monotonic() + 60
        while not report.is_file() and time.monotonic() < deadline:
            time.sleep(0.5)
        log = (folder / "superlink.log").read_text()[-2000:]
        assert report.is_file(), done.stdout[-2000:] + done.stderr[-2000:] + log
    return folder / "out"


@pytest.mark.parametrize("simulation", [False, True], ids=["two supernodes", "simulation"])
def test_flwr_run_equals_in_process(tmp_path: Path, simulation: bool) -> None:
    """The same weights, account and figures as without Flower, bit by bit."""
    found = run_app(tmp_path, simulation=simulation)
    same_result(found, in_process(tmp_path, num_rounds=2, num_clients=4))
