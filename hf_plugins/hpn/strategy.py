"""HPN over Flower: the same three phases with the clients on other machines.

``flwr run configs/hpn/flower_app``; the server and every node read one recipe, each from its own disk.
"""

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result, Strategy
from torch import nn

from hf_plugins import recipes
from hf_plugins.hpn.client import job_config
from hf_plugins.hpn.config import HPNConfig, read_recipe
from hf_plugins.hpn.dataset import make_federation
from hf_plugins.hpn.server import Federation, HPNRun
from hf_plugins.hpn.space import Config, Space, space_from
from hf_plugins.rounds import InProcess, Job, RoundContext, RoundEngine, TrainableVector
from hf_plugins.rounds.flower import (
    FlowerTransport,
    Population,
    from_arrays,
    hosted_share,
    round_client_app,
    to_arrays,
)

logger = logging.getLogger(__name__)


class HPNStrategy(Strategy):
    """Search and deploy over a grid: ``HPNStrategy(model, space, ...).start(grid)``.

    Each client's config travels in the ``ConfigRecord`` of its own message, its figures and the values in
    force come back in a ``MetricRecord``; anchors and states stay with the server. A server that was killed
    goes on from its folder. Clients are `HPNClient`, for example under `round_client_app`.
    """

    def __init__(
        self,
        model: nn.Module,
        space: Space,
        config: HPNConfig,
        *,
        num_clients: int,
        folder: Path | str,
        num_nodes: int = 1,
        timeout: float = 3600.0,
    ) -> None:
        """Args:
        model: The server's copy: names, shapes, initial weights.
        space: What is searched.
        config: Options.
        num_clients: Clients in all; ids are 0 to this less one.
        folder: Anchors, states and results.
        num_nodes: SuperNodes to wait for.
        timeout: Seconds to wait for a round's answers; who is late drops out of the step.
        """
        self.weights = TrainableVector(model)
        self.space, self.config = space, config
        self.num_clients, self.folder = num_clients, Path(folder)
        self.num_nodes, self.timeout = num_nodes, timeout
        self._round: tuple[RoundEngine, RoundContext, list[Job]] | None = None
        self._grid: tuple[Grid, FlowerTransport] | None = None

    def _transport(self, grid: Grid) -> FlowerTransport:
        if self._grid is None or self._grid[0] is not grid:
            transport = FlowerTransport(
                grid,
                self.weights,
                num_clients=self.num_clients,
                num_nodes=self.num_nodes,
                timeout=self.timeout,
            )
            self._grid = (grid, transport)
        return self._grid[1]

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Anchor, search, deploy; or what is left of them after a restart.

        Args:
            grid: Of the ServerApp.
            initial_arrays: Global model at the start; None: the weights of ``model``.
            num_rounds: Not taken: the options say how many rounds each phase has.
            timeout: Instead of the constructor's.
            train_config: Not taken: configs are what is searched.
            evaluate_config: Not taken.
            evaluate_fn: Flower's own form of central evaluation, of the deployed model.

        Returns:
            Flower's result: the deployed model, and what its clients measured.

        Raises:
            ValueError: If an argument is given that this strategy does not take.
        """
        if num_rounds not in (None, self.config.num_rounds) or train_config or evaluate_config:
            raise ValueError(
                "HPNStrategy takes rounds and configs from HPNConfig; leave out num_rounds, train_config and "
                "evaluate_config."
            )
        self.timeout = self.timeout if timeout is None else timeout
        initial = self.weights.read() if initial_arrays is None else from_arrays(self.weights, initial_arrays)
        federation = Federation(transport=self._transport(grid), initial_D=initial)
        run = HPNRun(federation, self.space, self.config, self.folder)
        done = run.deploy(run.search())
        result = Result()
        result.arrays = to_arrays(self.weights, run.deployed_D)
        figures = {f"{kind}-{name}": v for kind in ("global", "personal") for name, v in done[kind].items()}
        result.evaluate_metrics_clientapp[self.config.num_rounds] = MetricRecord(figures)
        if evaluate_fn is not None and (found := evaluate_fn(self.config.num_rounds, result.arrays)):
            result.evaluate_metrics_serverapp[self.config.num_rounds] = found
        return result

    def _found(self) -> dict[int, Config]:
        path = self.folder / "search.json"
        if not path.is_file():
            raise RuntimeError(
                f"{path} does not exist, so there are no configs to deploy; call start(), which searches "
                "first."
            )
        configs = json.loads(path.read_text(encoding="utf-8"))["configs"]
        return {int(client): config for client, config in configs.items()}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages of one round of a deployment, each with its client's config; for Flower's own loop.

        Raises:
            RuntimeError: If no search has been done in the folder.
        """
        jobs = {client: job_config(found) for client, found in self._found().items()}
        transport = self._transport(grid)
        engine = RoundEngine(transport, from_arrays(self.weights, arrays), seed=self.config.seed)
        context, work = engine.begin(
            engine.vector_D, server_round - 1, configure=lambda context, client: {**config, **jobs[client]}
        )
        self._round = (engine, context, work)
        return transport.messages(work, context.start_D, base=context.base, kind="train")

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next global model from a round's replies.

        Raises:
            RuntimeError: If the round was not configured by this strategy.
        """
        if self._round is None or self._round[1].round_index != server_round - 1:
            raise RuntimeError(
                f"round {server_round} was not configured by this strategy; call configure_train first."
            )
        (engine, context, work), self._round = self._round, None
        assert isinstance(engine.transport, FlowerTransport), "configure_train has connected"
        outcome = engine.complete(context, engine.transport.answers(work, replies))
        return to_arrays(self.weights, outcome.vector_D), MetricRecord(outcome.metrics)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nobody; `start` asks for the figures that it needs itself."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing, as nobody was asked."""
        return None

    def summary(self) -> None:
        """Log what will be done."""
        logger.info(
            "HPN (%s): %d anchor rounds, %d search steps, %d rounds of deployment, %d clients",
            self.config.method,
            self.config.num_rounds,
            self.config.num_steps,
            self.config.num_rounds,
            self.num_clients,
        )


def _recipe(*configs: Any) -> tuple[HPNConfig, Space, Federation, str]:
    """The recipe that a run's config names, or a node's, which comes last."""
    path = next((str(c["recipe"]) for c in reversed(configs) if c.get("recipe")), None)
    if path is None or not Path(path).is_file():
        raise ValueError(
            f"the run's config must name a recipe file on this machine; got recipe={path!r}. Give "
            "--run-config \"recipe='/path/recipe.yaml'\" or a node's own with --node-config."
        )
    config, task = read_recipe(recipes.read_recipe(path))
    space = space_from(task.space, grid_size=task.grid_size, grid_kind=task.grid_kind)
    return config, space, make_federation(task.task, task.task_args, config), task.output_dir


def recipe_population(context: Context) -> Population:
    """The clients of a node that runs a recipe: every n-th one."""
    federation = _recipe(context.run_config, context.node_config)[2]
    transport = federation.transport
    assert isinstance(transport, InProcess), "tasks of the command line are in process"
    return Population(transport=transport, hosted=hosted_share(context, len(transport.clients)))


server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the recipe; results lie in its ``output_dir``, from which a restart goes on."""
    config, space, federation, folder = _recipe(context.run_config)
    transport = federation.transport
    assert isinstance(transport, InProcess), "tasks of the command line are in process"
    strategy = HPNStrategy(
        transport.weights.model,
        space,
        config,
        num_clients=len(transport.clients),
        folder=str(context.run_config.get("output-dir") or folder),
        num_nodes=int(context.run_config.get("num-nodes", 1)),
        timeout=float(context.run_config.get("timeout", 3600)),
    )
    strategy.summary()
    strategy.start(grid)


client_app = round_client_app(recipe_population, finish_needed=False)
