"""Flower strategy: user-level DP-FedAvg with BLUR and LUS, the same functions as in process."""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor, nn

from hf_plugins.dp_fedavg.config import DPFedAvgConfig
from hf_plugins.dp_fedavg.trainer import PrivateMean, private_engine
from hf_plugins.rounds import Config, Job, RoundContext, RoundEngine, TrainableVector
from hf_plugins.rounds.flower import FlowerTransport, from_arrays, to_arrays

logger = logging.getLogger(__name__)


class UserLevelDP(Strategy):
    """Strategy with a guarantee for each user: ``UserLevelDP(model, dp, ...).start(grid, arrays)``.

    Cohorts are drawn as the accountant assumes, updates are clipped again on the server, the denominator is
    fixed, the noise covers every coordinate, and each round is charged before it is looked at. Clients need
    `hf_plugins.dp_fedavg.client.user_level_mod` around their train function. With a folder, a server that was
    killed goes on from its last round, weights and account as if uninterrupted.

    Args:
        model: The server's copy of the model: names, shapes and the check for private training.
        dp: Options of the method.
        num_clients: Users in all, K; the accountant's population, whoever is connected.
        num_rounds: Rounds that the budget is planned for.
        evaluate: Figures of a global model (a vector), or None.
        folder: Checkpoints and metrics, or None.
        num_nodes: SuperNodes to wait for.
        timeout: Seconds to wait for a round's answers.
        local: Options of local training that every client gets in its config.
        **engine: More arguments of `hf_plugins.rounds.RoundEngine`.
    """

    def __init__(
        self,
        model: nn.Module,
        dp: DPFedAvgConfig,
        *,
        num_clients: int,
        num_rounds: int,
        evaluate: Callable[[Tensor], dict[str, float]] | None = None,
        folder: Path | str | None = None,
        num_nodes: int = 1,
        timeout: float = 3600.0,
        local: Config | None = None,
        **engine: Any,
    ) -> None:
        self.weights = TrainableVector(model)
        self.num_clients, self.num_rounds = num_clients, num_rounds
        self.num_nodes, self.timeout = num_nodes, timeout
        self._local = dict(local or {})
        self.engine: RoundEngine = private_engine(
            model,
            range(num_clients),
            dp,
            num_rounds=num_rounds,
            evaluate=evaluate,
            folder=folder,
            # The grid is known when the strategy starts.
            transport=None,
            **engine,
        )
        self.private: PrivateMean = self.engine.aggregate
        self.engine.configure = self._configure
        self._round: tuple[RoundContext, list[Job]] | None = None

    def _configure(self, context: RoundContext, client_id: int) -> Config:
        return {**self._local, **self.private.configure(context, client_id)}

    def _connect(self, grid: Grid) -> FlowerTransport:
        transport = self.engine.transport
        if not isinstance(transport, FlowerTransport) or transport.grid is not grid:
            transport = FlowerTransport(
                grid,
                self.weights,
                num_clients=self.num_clients,
                num_nodes=self.num_nodes,
                timeout=self.timeout,
            )
            self.engine.transport = transport
        return transport

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
        """All rounds, or those that are left after a restart.

        Args:
            grid: Of the ServerApp.
            initial_arrays: Global model at the start; None: the weights of ``model``.
            num_rounds: None: all that were planned. Fewer is possible, more is not paid for.
            timeout: Instead of the constructor's.
            train_config: Keys for every client's config.
            evaluate_config: Not taken: evaluation on clients would need a budget of its own.
            evaluate_fn: Flower's own form of central evaluation.

        Returns:
            Flower's result: final arrays, and each round's figures.

        Raises:
            ValueError: If more rounds are asked for than planned, or evaluation on clients is.
            RuntimeError: If nodes do not come, or the budget is spent.
        """
        if evaluate_config:
            raise ValueError(
                "evaluate_config asks clients for figures that no noise covers; give evaluate= or "
                "evaluate_fn= and test on the server."
            )
        rounds = self.num_rounds if num_rounds is None else num_rounds
        if rounds > self.num_rounds:
            raise ValueError(
                f"num_rounds={rounds}, but noise and budget were planned for {self.num_rounds}; plan the "
                "strategy with num_rounds of the whole run."
            )
        self.timeout = self.timeout if timeout is None else timeout
        self._local |= dict(train_config or {})
        self._connect(grid)
        if initial_arrays is not None:
            self.engine.vector_D = from_arrays(self.weights, initial_arrays)
        history = self.engine.run(rounds)
        return self._result(history, evaluate_fn)

    def _result(self, history: Sequence[dict[str, Any]], evaluate_fn: Any) -> Result:
        result = Result()
        result.arrays = to_arrays(self.weights, self.engine.vector_D)
        for row in history:
            figures = {k: float(v) for k, v in row.items() if k != "round"}
            result.train_metrics_clientapp[int(row["round"])] = MetricRecord(figures)
        if evaluate_fn is not None and (found := evaluate_fn(self.engine.round_index, result.arrays)):
            result.evaluate_metrics_serverapp[self.engine.round_index] = found
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages to the users drawn for a round; for Flower's own loop, which saves no checkpoints."""
        transport = self._connect(grid)
        self._local |= dict(config)
        context, jobs = self.engine.begin(from_arrays(self.weights, arrays), server_round - 1)
        self._round = (context, jobs)
        return transport.messages(jobs, context.start_D, base=context.base, kind="train")

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next global model from a round's replies.

        Raises:
            RuntimeError: If the round was not configured by this strategy.
        """
        if self._round is None or self._round[0].round_index != server_round - 1:
            raise RuntimeError(
                f"round {server_round} was not configured by this strategy; call configure_train first."
            )
        (context, jobs), self._round = self._round, None
        transport = self.engine.transport
        assert isinstance(transport, FlowerTransport), "configure_train has connected"
        outcome = self.engine.complete(context, transport.answers(jobs, replies))
        shown = {k: v for k, v in outcome.metrics.items() if not k.startswith(self.engine.hidden)}
        return to_arrays(self.weights, outcome.vector_D), MetricRecord(shown)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nobody: what clients measure on their own data would leave without noise."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing, as nobody was asked."""
        return None

    def summary(self) -> None:
        """Log the guarantee that is planned."""
        report = self.private.report()
        logger.info(
            "user-level DP: %s sampling of %d users, noise multiplier %.4g, clipping norm %.4g, delta %.2g",
            report["sampling"],
            self.num_clients,
            report["noise_multiplier"],
            self.private.clipping_norm,
            report["delta"],
        )
