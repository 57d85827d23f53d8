"""HPN over Flower's real engines: the same result as in process, in simulation."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from hf_plugins.hpn.client import HPNClient
from hf_plugins.hpn.server import HPNRun
from hf_plugins.hpn.strategy import HPNStrategy, recipe_population
from hf_plugins.rounds import ClientFailed
from hf_plugins.rounds.flower import Population, hosted_share, round_client_app
from tests.hf_plugins.hpn import tiny
from tests.hf_plugins.hpn.test_main import RECIPE

pytestmark = pytest.mark.host

NUM_CLIENTS = 3


def _options() -> Any:
    return tiny.config(num_rounds=2, num_steps=3)


def _population(context: Context) -> Population:
    federation = tiny.federation(_options(), NUM_CLIENTS)
    clients = federation.transport.clients
    clients[1] = _Unlucky(clients[1])
    return Population(transport=federation.transport, hosted=hosted_share(context, NUM_CLIENTS))


class _Unlucky(HPNClient):
    """Dies under one of the two learning rates."""

    def __init__(self, other: HPNClient) -> None:
        self.__dict__.update(other.__dict__)

    def train(self, weights: Any, job: Any) -> Any:
        if job.config["learning_rate"] == 1.0:
            raise ClientFailed("out of battery")
        return super().train(weights, job)


def _simulate(folder: Path) -> list[Any]:
    found: list[Any] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = HPNStrategy(
            tiny.model(),
            tiny.SPACE,
            _options(),
            num_clients=NUM_CLIENTS,
            folder=folder,
            num_nodes=2,
            timeout=200,
        )
        strategy.summary()
        found.append(strategy.start(grid))
        # Flower's own loop, one round of it: the deployed configs, each in its client's message.
        arrays = found[0].arrays
        messages = list(strategy.configure_train(1, arrays, ConfigRecord(), grid))
        found.append([dict(m.content.config_records["config"]) for m in messages])
        replies = grid.send_and_receive(messages, timeout=200)
        found.append(strategy.aggregate_train(1, replies))
        found.append(
            (
                list(strategy.configure_evaluate(1, arrays, ConfigRecord(), grid)),
                strategy.aggregate_evaluate(1, []),
            )
        )

    backend = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 1}}
    run_simulation(
        server, round_client_app(_population, finish_needed=False), num_supernodes=2, backend_config=backend
    )
    return found


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[Any]]]:
    folder = tmp_path_factory.mktemp("flower")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[3])
    yield folder, _simulate(folder)
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def test_simulation_equals_in_process(simulated: tuple[Path, list[Any]], tmp_path: Path) -> None:
    """Same seed, same clients (one of which dies now and then): same configs, same figures."""
    folder, found = simulated
    federation = tiny.federation(_options(), NUM_CLIENTS)
    federation.test = None
    federation.transport.clients[1] = _Unlucky(federation.transport.clients[1])
    run = HPNRun(federation, tiny.SPACE, _options(), tmp_path, progress=False)
    here = run.search()
    there = json.loads((folder / "search.json").read_text())["configs"]
    assert {str(client): config for client, config in here.items()} == there
    deployed = run.deploy(here)
    assert deployed["clients"] == json.loads((folder / "deploy.json").read_text())["clients"]
    result = found[0]
    assert isinstance(result.arrays, ArrayRecord)
    assert dict(result.evaluate_metrics_clientapp[2])["global-mean"] == pytest.approx(
        deployed["global"]["mean"]
    )


def test_each_message_carries_its_clients_config(simulated: tuple[Path, list[Any]]) -> None:
    folder, found = simulated
    configs = json.loads((folder / "search.json").read_text())["configs"]
    assert len(found[1]) == NUM_CLIENTS
    for record in found[1]:
        config = configs[str(record["rounds.client"])]
        assert record["learning_rate"] == config["learning_rate"]
        assert record["hpn.dropout"] == config["dropout"]
    arrays, metrics = found[2]
    assert isinstance(arrays, ArrayRecord)
    assert metrics["rounds/cohort"] == 3.0
    assert found[3] == ([], None)


def test_what_is_refused(tmp_path: Path) -> None:
    strategy = HPNStrategy(tiny.model(), tiny.SPACE, tiny.config(), num_clients=2, folder=tmp_path)
    with pytest.raises(ValueError, match="HPNStrategy takes rounds and configs from HPNConfig; leave out"):
        strategy.start(None, num_rounds=99)
    with pytest.raises(
        RuntimeError, match=r"so there are no configs to deploy; call start\(\), which searches"
    ):
        strategy.configure_train(1, ArrayRecord(), ConfigRecord(), None)
    with pytest.raises(
        RuntimeError, match="round 1.* was not configured by this strategy; call configure_train"
    ):
        strategy.aggregate_train(1, [])
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    with pytest.raises(ValueError, match="the run's config must name a recipe file on this machine"):
        recipe_population(context)


@pytest.mark.slow
def test_flwr_run_on_a_superlink_with_two_supernodes(tmp_path: Path) -> None:
    """The released app over real processes finds what one process finds."""
    from hf_plugins.hpn.__main__ import main
    from tests.hf_plugins.dp_fedavg.deployment import ROOT, deployment

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("num_rounds: 3", "num_rounds: 2") % 2)
    assert main(["search", str(recipe), "--output-dir", str(tmp_path / "here")]) == 0
    deployed = tmp_path / "there" / "deploy.json"
    with deployment(tmp_path, num_nodes=2) as found:
        config = f"recipe='{recipe}' output-dir='{tmp_path / 'there'}'"
        app = str(ROOT / "configs" / "hpn" / "flower_app")
        done = found.flwr("run", app, "here", "--run-config", config, "--stream", timeout=500)
        deadline = time.monotonic() + 60
        while not deployed.is_file() and time.monotonic() < deadline:
            time.sleep(0.5)
        log = (tmp_path / "superlink.log").read_text()[-2000:]
        assert deployed.is_file(), done.stdout[-3000:] + done.stderr[-3000:] + log
    searches = [json.loads((tmp_path / n / "search.json").read_text()) for n in ("here", "there")]
    assert searches[0]["configs"] == searches[1]["configs"]
