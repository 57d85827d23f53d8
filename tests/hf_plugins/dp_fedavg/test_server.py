"""``flwr run`` for real: the simulation, and a SuperLink with two SuperNodes on loopback."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("flwr")
pytest.importorskip("ray")

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


def test_superlink_with_two_supernodes_equals_in_process(tmp_path: Path) -> None:
    """Four users on two nodes, two rounds; every process is real and listens on 127.0.0.1 only."""
    overrides = {"data": str(DATA), "output-dir": str(tmp_path / "out"), "num-rounds": 2, "num-clients": 4}
    with deployment(tmp_path) as federation:
        done = federation.run_app(overrides, timeout=500)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        deadline = time.monotonic() + 60
        while not (tmp_path / "out" / "report.json").is_file() and time.monotonic() < deadline:
            time.sleep(0.5)
    same_result(tmp_path / "out", in_process(tmp_path, num_rounds=2, num_clients=4))


def test_a_node_that_dies_and_a_second_run_that_goes_on(tmp_path: Path) -> None:
    """One of two SuperNodes is killed: its users do not answer, the rounds complete, epsilon is as planned.

    A second ``flwr run`` after the SuperLink itself was killed finds the finished rounds and adds none.
    """
    overrides = {"data": str(DATA), "output-dir": str(tmp_path / "out"), "num-rounds": 2, "num-clients": 4}
    overrides |= {"rounds.num-nodes": 1, "rounds.timeout": 60}
    with deployment(tmp_path) as federation:
        federation.stop("supernode-1", signal.SIGKILL)
        done = federation.run_app(overrides, timeout=500)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    first = json.loads((tmp_path / "out" / "report.json").read_text())
    whole = json.loads((in_process(tmp_path, num_rounds=2, num_clients=4) / "report.json").read_text())
    assert first["epsilon"] == whole["epsilon"]
    assert first["rounds"] == 2
    kept = (tmp_path / "out" / "checkpoint.pt").read_bytes()
    shutil.rmtree(tmp_path / "home")
    with deployment(tmp_path, num_nodes=1) as federation:
        assert federation.run_app(overrides, timeout=500).returncode == 0
    assert (tmp_path / "out" / "checkpoint.pt").read_bytes() == kept


def test_simulation_equals_in_process(tmp_path: Path) -> None:
    """Flower's simulation engine with two simulated SuperNodes, through run_simulation."""
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    from hf_plugins.dp_fedavg.strategy import UserLevelDP
    from tests.hf_plugins.dp_fedavg.simulation import dp, simulated_clients
    from tests.hf_plugins.dp_fedavg.tiny import engine
    from tests.hf_plugins.rounds import tiny

    server, found = ServerApp(), {}

    @server.main()
    def run(grid: Grid, context: object) -> None:
        strategy = UserLevelDP(
            tiny.model(), dp(), num_clients=8, num_rounds=2, evaluate_every=9, num_nodes=2, folder=tmp_path
        )
        strategy.start(grid)
        found["vector"] = strategy.engine.vector_D

    run_simulation(
        server_app=server,
        client_app=simulated_clients(),
        num_supernodes=2,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 1}},
    )
    local = engine(dp(), num_rounds=2)
    local.run(2)
    assert torch.equal(found["vector"], local.vector_D)
