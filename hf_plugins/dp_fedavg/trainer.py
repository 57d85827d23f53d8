"""The server's side as an aggregator of the round engine, and the engine that a recipe describes."""

import json
import logging
import math
import secrets
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from hf_plugins.accounting import AccountantName, Ledger, Release, noise_multiplier_for
from hf_plugins.dp_fedavg.aggregation import (
    RunningSum,
    next_clipping_norm,
    private_step,
    update_noise_multiplier,
)
from hf_plugins.dp_fedavg.clipping import clip_update
from hf_plugins.dp_fedavg.config import DPFedAvgConfig, RunConfig
from hf_plugins.dp_fedavg.dataset import load_users
from hf_plugins.dp_fedavg.hook import FinishUpdate, client_options, gradient_term
from hf_plugins.dp_fedavg.metric import TestAccuracy, record_loss
from hf_plugins.dp_fedavg.model import CharacterModel, check_private_model, image_model
from hf_plugins.dp_fedavg.noise import missing_std
from hf_plugins.rounds import (
    Aggregate,
    Client,
    Config,
    GroupedInProcess,
    InProcess,
    LazyClients,
    LocalTraining,
    RoundContext,
    RoundEngine,
    Sampling,
    TorchClient,
    TrainableVector,
    Transport,
    Update,
    generator_for,
)
from hf_plugins.secure_noise import gaussian
from hf_plugins.whole_files import write_bytes, write_json

logger = logging.getLogger(__name__)
# What a round's row may hold although no noise covers it: nothing, unless the user says so.
PRIVATE_METRICS = ("clients/", "rounds/cohort", "rounds/dropped", "rounds/seconds", "dp_fedavg/private/")


class PrivateMean:
    """Aggregator: sum of updates of norm at most S, plus noise, over a fixed denominator; each round is paid.

    Args:
        config: Options of the method.
        num_clients: Users in all.
        num_rounds: Rounds that the budget is planned for; a further one is refused.
    """

    def __init__(self, config: DPFedAvgConfig, *, num_clients: int, num_rounds: int) -> None:
        if config.sampling == "fixed" and config.cohort_size > num_clients:
            raise ValueError(f"cohort_size={config.cohort_size} users a round, but there are {num_clients}.")
        self.config = config
        self.num_clients = num_clients
        self.num_rounds = num_rounds
        self.delta = config.delta_for(num_clients)
        if self.delta >= 1 / num_clients:
            logger.warning(
                "delta=%g is at least 1 / %d users: releasing one user's data outright would satisfy it. "
                "Take a smaller one, or leave it out.",
                self.delta,
                num_clients,
            )
        self.expected_users = config.expected_users(num_clients)
        self.ledger = Ledger()
        self.noise_multiplier = (
            float(config.noise_multiplier)
            if config.noise_multiplier is not None
            else noise_multiplier_for(target_epsilon=config.target_epsilon or 0.0, **self._mode(num_rounds))
        )
        # PLD needs minutes and gigabytes for so little noise; RDP is an upper bound as well, and loose.
        self.accountant: AccountantName = "rdp" if 0 < self.noise_multiplier < 0.3 else "auto"
        self.clipping_norm = config.clipping_norm
        self.count_noise_std = config.count_noise_std or self.expected_users / 20
        self.update_multiplier = (
            self.noise_multiplier
            if config.quantile is None
            else update_noise_multiplier(self.noise_multiplier, self.count_noise_std)
        )

    def _mode(self, num_rounds: int) -> dict[str, Any]:
        """The accountant's view of the rounds."""
        mode: dict[str, Any] = {
            "num_steps": num_rounds,
            "delta": self.delta,
            "sampling": self.config.sampling,
        }
        if self.config.sampling == "poisson":
            return mode | {"sample_rate": self.config.sample_rate}
        return mode | {"batch_size": self.config.cohort_size, "num_records": self.num_clients}

    def sampling(self) -> Sampling:
        """The engine's sampling, the same that is paid for."""
        config = self.config
        size = config.cohort_size if config.sampling == "fixed" else 0
        return Sampling(mode=config.sampling, rate=config.sample_rate, size=size, secure=config.secure)

    def configure(self, context: RoundContext, client_id: int) -> Config:
        """What a user must know of the method in this round."""
        return client_options(
            self.config,
            clipping_norm=self.clipping_norm,
            noise_multiplier=self.update_multiplier,
            num_clients=self.num_clients,
        )

    def __call__(self, updates: Iterable[Update], context: RoundContext) -> Aggregate:
        """One round; see `hf_plugins.rounds.Aggregator`.

        Raises:
            RuntimeError: If the budget is spent, or shares are missing and ``missing_shares='stop'``.
        """
        self.pay()
        total = RunningSum(context.start_D.numel())
        norms, within, clipped = [], 0, 0.0
        for update in updates:
            vector = update.vector_D
            if self.config.noise_mode == "central":
                # Users have clipped already; one that has not must not count for more.
                vector = clip_update([vector], self.clipping_norm)[0][0]
            total.add(vector)
            norm = update.metrics.get("norm", 0.0)
            norms.append(norm)
            within += norm <= self.clipping_norm
            clipped += float(norm > self.clipping_norm)
        noise = self._noise(total, context)
        step = private_step(
            total.sum_D, noise, expected_users=self.expected_users, server_lr=self.config.server_lr
        )
        metrics = {
            "dp_fedavg/clipping_norm": self.clipping_norm,
            "dp_fedavg/noise_std": self.update_multiplier * self.clipping_norm / self.expected_users,
        }
        if norms and self.config.noise_mode == "central":
            metrics["dp_fedavg/private/clipped_ratio"] = clipped / len(norms)
            metrics["dp_fedavg/private/norm_median"] = statistics.median(norms)
            metrics["dp_fedavg/private/norm_max"] = max(norms)
        self._warn_of_dropped(context)
        self._follow_quantile(within, context)
        return Aggregate(step_D=step, metrics=metrics)

    def pay(self) -> None:
        """Charge one round, before anything of it is looked at.

        Raises:
            RuntimeError: If all planned rounds are spent.
        """
        if self.ledger.num_steps >= self.num_rounds and self.noise_multiplier > 0:
            raise RuntimeError(
                f"the noise was chosen for {self.num_rounds} rounds and all of them are spent; plan "
                "a new run with more rounds, which needs more noise in each."
            )
        config = self.config
        poisson = config.sampling == "poisson"
        self.ledger.add(
            Release(
                noise_multiplier=self.noise_multiplier,
                num_steps=1,
                sampling=config.sampling,
                sample_rate=config.sample_rate if poisson else 1.0,
                batch_size=0 if poisson else config.cohort_size,
                num_records=0 if poisson else self.num_clients,
            )
        )

    def _noise(self, total: RunningSum, context: RoundContext) -> Tensor:
        bound, multiplier = self.clipping_norm, self.update_multiplier
        std = multiplier * bound if multiplier else 0.0
        if self.config.noise_mode == "shares" and multiplier:
            std = missing_std(multiplier, bound, self.expected_users, total.count)
            if std and self.config.missing_shares == "stop":
                raise RuntimeError(
                    f"round {context.round_index}: {total.count} of {self.expected_users:g} noise "
                    "shares came, so the sum is under-noised and is not looked at. Run again, or set "
                    "missing_shares='top_up'."
                )
        return gaussian(total.sum_D.numel(), std, generator=self._generator(context, "noise"))

    def _generator(self, context: RoundContext, what: str) -> torch.Generator | None:
        return None if self.config.secure else generator_for(context.seed, what, context.round_index)

    def _follow_quantile(self, within: int, context: RoundContext) -> None:
        if self.config.quantile is None:
            return
        # Centred: a user moves the sum by one half, whichever way.
        centred = within - len(context.updates) / 2
        std = self.count_noise_std if self.noise_multiplier else 0.0
        noise = gaussian(1, std, generator=self._generator(context, "count"))
        share = float(centred + noise) / self.expected_users + 0.5
        self.clipping_norm = next_clipping_norm(
            self.clipping_norm, share, quantile=self.config.quantile, learning_rate=self.config.quantile_lr
        )

    def _warn_of_dropped(self, context: RoundContext) -> None:
        for dropped in context.dropped:
            logger.warning(
                "round %d: client %d does not count (%s%s)",
                context.round_index,
                dropped.client_id,
                dropped.reason,
                f": {dropped.detail}" if dropped.detail else "",
            )

    def epsilon(self) -> float:
        """Epsilon of all rounds so far; infinite without noise."""
        return self.ledger.epsilon(delta=self.delta, accountant=self.accountant)

    def state_dict(self) -> dict[str, Any]:
        """Ledger and clipping norm, for a checkpoint."""
        return {"ledger": self.ledger.state_dict(), "clipping_norm": self.clipping_norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.ledger.load_state_dict(state["ledger"])
        self.clipping_norm = float(state["clipping_norm"])

    def report(self) -> dict[str, Any]:
        """The guarantee in plain values."""
        return {
            "epsilon": finite(self.epsilon()),
            "delta": self.delta,
            "accountant": "rdp" if self.accountant == "rdp" or self.config.sampling == "fixed" else "pld",
            "unit": "user",
            "sampling": self.config.sampling,
            "neighbours": "add or remove one user"
            if self.config.sampling == "poisson"
            else "replace one user",
            "noise_multiplier": self.noise_multiplier,
            "rounds": self.ledger.num_steps,
            "users": self.num_clients,
            "expected_users": self.expected_users,
        }


def finite(value: float) -> float:
    """JSON has no infinity; the largest float stands for no guarantee at all."""
    return value if math.isfinite(value) else sys.float_info.max


def secret_seed(folder: Path) -> int:
    """A seed from the operating system that stays in the run's folder, so that a run can go on."""
    path = folder / "secret.json"
    if not path.is_file():
        write_json(path, {"seed": secrets.randbits(62)}, private=True)
    return int(json.loads(path.read_text(encoding="utf-8"))["seed"])


@dataclass(kw_only=True)
class Task:
    """What a recipe trains: model, users, and how the global model is judged."""

    model: nn.Module
    """The resident model, initial weights in."""
    clients: LazyClients
    """Users, made when asked for."""
    evaluate: Callable[[Tensor], dict[str, float]]
    """Figures of a global model on test records."""


def build_task(run: RunConfig, local: dict[str, Any]) -> Task:
    """Model and users of a recipe.

    Args:
        run: Task, data, users.
        local: Options of local training: `LocalTraining` (images, characters) or ``TrainingArguments``
            (text).

    Raises:
        ValueError: If an option of local training does not exist, or the model cannot be trained privately.
    """
    if run.task == "text":
        from hf_plugins.dp_fedavg.peft import TextUsers

        text = TextUsers(run, local)
        check_private_model(text.model)
        return Task(model=text.model, clients=LazyClients(len(text), text.client), evaluate=text.evaluate)
    training = LocalTraining().with_config(local)
    users = load_users(run)
    torch.manual_seed(run.model_seed)
    if run.task == "images":
        model = image_model(run.model, num_classes=users.num_classes, size=users.test[0].shape[-1])
    else:
        model = CharacterModel(users.num_classes)
    check_private_model(model)

    def client(client_id: int) -> TorchClient:
        return TorchClient(
            client_id,
            users.records(client_id),
            loss=record_loss,
            training=training,
            terms=[gradient_term],
        )

    return Task(
        model=model,
        clients=LazyClients(len(users), client),
        evaluate=TestAccuracy(TrainableVector(model), users.test),
    )


def private_engine(
    model: nn.Module,
    clients: Sequence[Client],
    dp: DPFedAvgConfig,
    *,
    num_rounds: int,
    evaluate: Callable[[Tensor], dict[str, float]] | None = None,
    folder: Path | str | None = None,
    transport: Transport | None = None,
    group_size: int = 1,
    **engine: Any,
) -> RoundEngine:
    """A round engine with user-level DP: ``private_engine(...).run(num_rounds)``.

    Args:
        model: The resident model.
        clients: Users, with ``terms=[gradient_term]`` so that BLUR acts.
        dp: Options of the method.
        num_rounds: Rounds that the budget is planned for.
        evaluate: Figures of a global model, or None.
        folder: Checkpoints and metrics; needed where ``dp.seed`` is None and the run shall resume.
        group_size: Clients trained side by side in this process; see `hf_plugins.rounds.GroupedInProcess`.
        transport: Instead of one process: the way to clients elsewhere.
        **engine: More arguments of `hf_plugins.rounds.RoundEngine`.

    Returns:
        The engine; ``engine.aggregate`` is its `PrivateMean`, with ``epsilon()`` and ``report()``.

    Raises:
        ValueError: If the model cannot be trained privately, or checkpoints are too far apart.
    """
    check_private_model(model)
    if dp.secure and engine.get("save_every", 1) != 1:
        raise ValueError("secure=True needs save_every=1: a round that is repeated would draw other noise.")
    weights = TrainableVector(model)
    private = PrivateMean(dp, num_clients=len(clients), num_rounds=num_rounds)
    if dp.seed is not None:
        seed = dp.seed
    else:
        seed = secrets.randbits(62) if folder is None else secret_seed(Path(folder))

    def judged(vector_D: Tensor) -> dict[str, float]:
        figures = evaluate(vector_D) if evaluate else {}
        return {**figures, "dp_fedavg/epsilon": finite(private.epsilon())}

    if transport is None:
        finish = FinishUpdate(weights.sizes, weights.names)
        grouped = group_size > 1
        transport = (
            GroupedInProcess(model, clients, group_size=group_size, finish=finish)
            if grouped
            else InProcess(model, clients, finish=finish)
        )
    return RoundEngine(
        transport,
        weights.read(),
        aggregate=private,
        sampling=private.sampling(),
        seed=seed,
        configure=private.configure,
        evaluate=judged,
        stateful={"dp_fedavg": private},
        folder=folder,
        settings={"dp": asdict(dp), "num_rounds": num_rounds, "num_clients": len(clients)},
        hidden=() if dp.log_private_statistics else PRIVATE_METRICS,
        **engine,
    )


def recipe_engine(task: Task, run: RunConfig, dp: DPFedAvgConfig, **engine: Any) -> RoundEngine:
    """The engine that a recipe describes; ``engine.run(run.num_rounds)`` trains or goes on."""
    return private_engine(
        task.model,
        task.clients,
        dp,
        num_rounds=run.num_rounds,
        evaluate=task.evaluate,
        evaluate_every=run.evaluate_every,
        folder=run.output_dir,
        group_size=run.group_size,
        **engine,
    )


def finish_run(engine: RoundEngine, model: nn.Module, run: RunConfig) -> dict[str, Any]:
    """Write the final model and the report of a finished run.

    Returns:
        Guarantee, figures of the last round and the folder.
    """
    folder = Path(run.output_dir)
    private = engine.aggregate
    assert isinstance(private, PrivateMean), "the engine comes from private_engine"
    figures = {name: value for name, value in engine.history[-1].items() if "/" in name}
    report = {**private.report(), **figures, "output_dir": run.output_dir}
    save_vector(folder / "model.safetensors", TrainableVector(model).named(engine.vector_D))
    write_json(folder / "report.json", report)
    return report


def save_vector(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write trained parameters by name, at once."""
    write_bytes(path, safetensors.torch.save({k: v.contiguous().clone() for k, v in tensors.items()}))
