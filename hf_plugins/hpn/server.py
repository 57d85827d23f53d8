"""The three phases on the round engine: anchor, search, deploy; each goes on where a kill has stopped it."""

import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hf_plugins.hpn.agent import Trial, make_searcher
from hf_plugins.hpn.client import COUNT, ENCODE, ENCODING, VALUE, check_appliers, job_config
from hf_plugins.hpn.config import HPNConfig
from hf_plugins.hpn.gaussian import combined_multiplier, gaussian_epsilon, noise_multiplier_for
from hf_plugins.hpn.rewards import draw_start
from hf_plugins.hpn.space import Config, Space
from hf_plugins.hpn.storage import (
    AnchorTrajectory,
    Figures,
    load_state,
    save_state,
    weighted_mean,
)
from hf_plugins.rounds import (
    Aggregate,
    Aggregator,
    Outcome,
    RoundContext,
    RoundEngine,
    Sampling,
    Transport,
    Update,
    generator_for,
    weighted_average,
)
from hf_plugins.rounds.storage import check_same_settings
from hf_plugins.whole_files import write_json

ARMS = ("random", "tpe")
"""Methods that train whole runs under one config for all clients."""


@dataclass(kw_only=True)
class Federation:
    """Clients and the model they share."""

    transport: Transport
    """Ways to clients that are `HPNClient`."""
    initial_D: Tensor
    """Global model at the start."""
    aggregate: Aggregator = weighted_average
    """What to make of a round's updates."""
    test: Transport | None = None
    """The same clients with test records in place of validation records; None: deployment reports
    validation figures."""
    known_best: dict[int, Config] = field(default_factory=dict)
    """True best configs, where a task knows them."""


@dataclass(kw_only=True)
class Plan:
    """One step of the search, before its round."""

    step: int
    start: int
    client_ids: list[int]
    actions_KP: Tensor
    configs: dict[int, Config]


def signed(value: float, metric: str) -> float:
    """A figure as something to make large."""
    return -value if "loss" in metric else value


def encoding_noise(config: HPNConfig) -> float:
    """Noise multiplier of an encoding under these options."""
    if config.encoding_epsilon is None:
        return config.encoding_noise_multiplier
    return noise_multiplier_for(config.encoding_epsilon, delta=config.delta)


class HPNRun:
    """Anchor, search and deploy for one method, in one folder.

    Args:
        federation: Clients and model.
        space: What is searched.
        config: Options.
        folder: Where anchors, states and results go.
        progress: Show bars (only where there is a terminal).
        on_step: Called with each step's figures.
    """

    def __init__(
        self,
        federation: Federation,
        space: Space,
        config: HPNConfig,
        folder: Path | str,
        *,
        progress: bool = True,
        on_step: Sequence[Callable[[dict[str, float]], None]] = (),
    ) -> None:
        check_appliers(space)
        self.federation, self.space, self.config = federation, space, config
        self.folder = Path(folder)
        self.progress = progress
        self.on_step = list(on_step)
        self.settings = {"space": space.to_mapping(), **asdict(config)}
        self.anchors = AnchorTrajectory(
            self.folder / "anchors", store=config.store, every=config.store_every, dtype=config.store_dtype
        )
        self.history: list[dict[str, float]] = []
        self.deployed_D = federation.initial_D
        self._stepper = self._engine()

    def _engine(self, **options: Any) -> RoundEngine:
        transport = options.pop("transport", self.federation.transport)
        return RoundEngine(
            transport,
            self.federation.initial_D,
            **{
                "aggregate": self.federation.aggregate,
                "sampling": Sampling(mode="all"),
                "seed": self.config.seed,
                "progress": self.progress,
                **options,
            },
        )

    def _figures(self, found: Mapping[int, Mapping[str, float]]) -> Figures:
        """Signed figures of those clients that have one."""
        metric = self.config.metric
        return {
            client: (signed(values[VALUE], metric), int(values[COUNT]))
            for client, values in found.items()
            if VALUE in values
        }

    # -- anchor ---------------------------------------------------------------------------------------

    def anchor(self) -> None:
        """Train with the default config for ``num_rounds`` rounds, keep the models and all figures.

        Raises:
            ValueError: If a client has no validation records, or the folder holds another run.
        """
        default = job_config(self.space.default())

        def aggregate(updates: Iterable[Update], context: RoundContext) -> Aggregate:
            done = self.federation.aggregate(updates, context)
            self.anchors.local[context.round_index] = self._figures(context.updates)
            return done

        def evaluate(vector_D: Tensor) -> dict[str, float]:
            figures = self._figures(engine.evaluate_clients(vector_D))
            self.anchors.aggregate[engine.round_index + 1] = figures
            return {f"hpn/{self.config.metric}": signed(weighted_mean(figures), self.config.metric)}

        engine: RoundEngine = self._engine(
            aggregate=aggregate,
            evaluate=evaluate,
            configure=lambda context, client: default,
            stateful={"anchors": self.anchors},
            folder=self.folder / "anchor",
            settings=self._anchor_settings(),
            on_round=[lambda row: self.anchors.put(int(row["round"]), engine.vector_D)],
        )
        if not engine.resume():
            self.anchors.aggregate[0] = self._figures(engine.evaluate_clients(engine.vector_D))
            self._check_validation()
        # A kill between the engine's checkpoint and the anchor's file leaves that file to be written.
        if not self.anchors.has(engine.round_index):
            self.anchors.put(engine.round_index, engine.vector_D)
        engine.run(self.config.num_rounds)

    def _anchor_settings(self) -> dict[str, Any]:
        """What an anchor run depends on: several searches can share one."""
        c = self.config
        return {
            "default": self.space.default(),
            "metric": c.metric,
            "store": [c.store, c.store_every, c.store_dtype],
            "reward_noise_multiplier": c.reward_noise_multiplier,
        }

    def _check_validation(self) -> None:
        missing = sorted(set(self.federation.transport.client_ids()) - set(self.anchors.aggregate[0]))
        if missing:
            raise ValueError(
                f"clients {missing[:10]} have no validation records, so no config can be judged there; give "
                "each client some, or leave these clients out."
            )

    # -- search ---------------------------------------------------------------------------------------

    def search(self) -> dict[int, Config]:
        """Find a config for every client and write ``search.json``.

        Returns:
            Client to config.
        """
        if self.config.method == "default":
            found = {int(c): self.space.default() for c in self.federation.transport.client_ids()}
            self._write(found, rounds=0, privacy={})
            return found
        if self.config.method in ARMS:
            return self._search_arms()
        self.anchor()
        searcher = make_searcher(self.space, self.config)
        first = self._resume(searcher)
        with tqdm(total=self.config.num_steps, initial=first, disable=None if self.progress else True) as bar:
            step = first
            while step < self.config.num_steps and not self._settled(searcher):
                row = searcher.tell(self.run_step(self.begin(searcher, step)))
                step += 1
                self.history.append({"step": float(step), **row})
                if step % self.config.save_every == 0:
                    self._save(searcher, step)
                for call in self.on_step:
                    call(self.history[-1])
                bar.set_postfix({k.split("/")[-1]: f"{v:.4g}" for k, v in row.items()}, refresh=False)
                bar.update()
        self._save(searcher, step)
        found = searcher.best()
        self._write(found, rounds=self.config.num_rounds + step, privacy=self._privacy(step))
        return found

    def _settled(self, searcher: Any) -> bool:
        return bool(self.config.patience) and searcher.unchanged >= self.config.patience

    def begin(self, searcher: Any, step: int) -> Plan:
        """Start, cohort and configs of a step: a function of the seed, the step and the searcher's state."""
        generator = generator_for(self.config.seed, "hpn step", step)
        start = draw_start(
            self.anchors.starts(self.config.num_rounds),
            generator=generator,
            released=self.config.method == "released",
        )
        ids = sorted(searcher.row)
        if 0 < self.config.cohort_size < len(ids):
            drawn = torch.randperm(len(ids), generator=generator)[: self.config.cohort_size].tolist()
            ids = sorted(ids[i] for i in drawn)
        actions_KP = searcher.ask(ids, step=step, generator=generator)
        return Plan(
            step=step,
            start=start,
            client_ids=ids,
            actions_KP=actions_KP,
            configs=searcher.configs(ids, actions_KP),
        )

    def run_step(self, plan: Plan) -> Trial:
        """One federated round from the plan's anchor, and what it gained."""
        outcome = self._stepper.step(
            self.anchors.get(plan.start),
            plan.start,
            configure=lambda context, client: job_config(plan.configs[client]),
            cohort=plan.client_ids,
        )
        return self.judge(plan, outcome)

    def judge(self, plan: Plan, outcome: Outcome) -> Trial:
        """Gains of the clients that took part.

        A client that died, or has no reference, drops out. One whose training diverged gained the loss of
        all it had: dropping it would teach the policy nothing about a rate that is too large.
        """
        c = self.config
        released = c.method == "released"
        if c.judged == "aggregate" or released:
            ids = None if released else plan.client_ids
            figures = self._figures(self._stepper.evaluate_clients(outcome.vector_D, ids))
        else:
            figures = self._figures(outcome.context.updates)
        took_part = set(outcome.context.updates)
        gains = {}
        for client in plan.client_ids:
            reference = self._reference(plan.start, client)
            if client in took_part and client in figures and reference is not None:
                gains[client] = figures[client][0] - reference
        for dropped in outcome.context.dropped:
            reference = self._reference(plan.start, dropped.client_id)
            if dropped.reason == "not finite" and reference is not None:
                gains[dropped.client_id] = -abs(reference)
        gains = {client: gain for client, gain in gains.items() if math.isfinite(gain)}
        counts = self.anchors.aggregate[plan.start]
        return Trial(
            step=plan.step,
            start=plan.start,
            client_ids=plan.client_ids,
            actions_KP=plan.actions_KP,
            gains=gains,
            weights={client: float(counts[client][1]) for client in gains},
            end=weighted_mean(figures),
            anchor=self.anchors.mean(plan.start),
        )

    def _reference(self, start: int, client: int) -> float | None:
        """What a client's figure is compared with."""
        if self.config.reference == "anchor":
            table = self.anchors.aggregate[start]
        elif self.config.judged == "local":
            table = self.anchors.local[start]
        else:
            table = self.anchors.aggregate[start + 1]
        return table[client][0] if client in table else None

    def encodings(self) -> dict[int, Tensor]:
        """Ask every client for its encoding."""
        ids = list(self.federation.transport.client_ids())
        answers = self._stepper.evaluate_clients(
            self.federation.initial_D, ids, configs={client: {ENCODE: True} for client in ids}
        )
        return {
            client: torch.tensor(
                [answer[key] for key in sorted(answer) if key.startswith(ENCODING)], dtype=torch.float64
            )
            for client, answer in answers.items()
        }

    def _resume(self, searcher: Any) -> int:
        state = load_state(self.folder / "search.pt")
        if state is None:
            searcher.enrol(self.encodings())
            return 0
        check_same_settings(state["settings"], self.settings, self.folder)
        searcher.load_state_dict(state["searcher"])
        self.history = state["history"]
        return int(state["step"])

    def _save(self, searcher: Any, step: int) -> None:
        state = {
            "settings": self.settings,
            "step": step,
            "searcher": searcher.state_dict(),
            "history": self.history,
        }
        save_state(self.folder / "search.pt", state)

    def _privacy(self, steps: int) -> dict[str, Any]:
        """What a client's data have paid for the search; updates of the model are another matter."""
        c = self.config
        # Each anchor round shows two values of a client, each step of the search one or (released) one more.
        values = (
            1 + 2 * c.num_rounds + steps * (2 if c.judged == "aggregate" or c.method == "released" else 1)
        )
        noise = combined_multiplier([c.reward_noise_multiplier] * values)
        spent = {
            "encoding": gaussian_epsilon(encoding_noise(c), delta=c.delta),
            "values": gaussian_epsilon(noise, delta=c.delta),
        }
        return {
            "delta": c.delta,
            "num_values": values,
            **{f"epsilon_{k}": v if math.isfinite(v) else "inf" for k, v in spent.items()},
        }

    # -- rivals that train whole runs -----------------------------------------------------------------

    def _search_arms(self) -> dict[int, Config]:
        """Random search or TPE over one config for all, with the rounds that anchor and search would take."""
        c = self.config
        num_arms = max(1, (c.num_rounds + c.num_steps) // c.num_rounds)
        path = self.folder / "arms.pt"
        state = load_state(path) or {"settings": self.settings, "arms": []}
        check_same_settings(state["settings"], self.settings, self.folder)
        done: list[tuple[Config, float]] = [tuple(arm) for arm in state["arms"]]
        propose = _proposer(self.space, c)
        for number in range(num_arms):
            config, report = propose(number)
            if number == len(done):
                done.append((config, self._train_arm(config)))
                save_state(path, {"settings": self.settings, "arms": [list(arm) for arm in done]})
            # A resumed search proposes again what it had proposed, and is told what it had been told.
            report(done[number][1])
        best = max(done, key=lambda arm: arm[1])[0]
        found = {int(client): best for client in self.federation.transport.client_ids()}
        self._write(found, rounds=num_arms * c.num_rounds, privacy={})
        return found

    def _train_arm(self, config: Config) -> float:
        engine = self._engine(configure=lambda context, client: job_config(config), progress=False)
        try:
            engine.run(self.config.num_rounds, resume=False)
        except RuntimeError:
            # The model is no longer finite: the worst that a config can do.
            return -math.inf
        return weighted_mean(self._figures(engine.evaluate_clients(engine.vector_D)))

    # -- deploy ---------------------------------------------------------------------------------------

    def _write(self, found: Mapping[int, Config], *, rounds: int, privacy: Mapping[str, Any]) -> None:
        write_json(
            self.folder / "search.json",
            {
                "method": self.config.method,
                "configs": {str(client): config for client, config in sorted(found.items())},
                "rounds_used": rounds,
                "privacy": dict(privacy),
                "config": self.settings,
                "seed": self.config.seed,
                "versions": versions(),
                "hardware": platform.machine(),
            },
        )

    def deploy(self, configs: Mapping[int, Config]) -> dict[str, Any]:
        """Train from the start, each client under its config, and write ``deploy.json``.

        Args:
            configs: From `search` or its file.

        Returns:
            Figures of each client: of the global model, and of its own after one more local round.
        """
        jobs = {client: job_config(config) for client, config in configs.items()}
        engine = self._engine(
            configure=lambda context, client: jobs[client],
            folder=self.folder / "deploy",
            settings={"configs": {str(client): config for client, config in sorted(configs.items())}},
            save_every=self.config.save_every,
        )
        engine.run(self.config.num_rounds)
        self.deployed_D = engine.vector_D
        judge = self._engine(transport=self.federation.test or self.federation.transport)
        shared = self._figures(judge.evaluate_clients(engine.vector_D))
        last = judge.step(
            engine.vector_D, self.config.num_rounds, configure=lambda context, client: jobs[client]
        )
        personal = self._figures(last.context.updates)
        result = {
            "metric": self.config.metric,
            "records": "test" if self.federation.test else "validation",
            "global": summary(shared),
            "personal": summary(personal),
            "clients": {
                str(client): {
                    "config": dict(configs[client]),
                    "global": shared.get(client, (None,))[0],
                    "personal": personal.get(client, (None,))[0],
                }
                for client in sorted(configs)
            },
            "config": self.settings,
            "seed": self.config.seed,
            "versions": versions(),
            "hardware": platform.machine(),
        }
        write_json(self.folder / "deploy.json", result)
        return result


def summary(figures: Figures) -> dict[str, float]:
    """Mean over clients, and mean of the worst tenth of them (at least one)."""
    values = sorted(value for value, _ in figures.values())
    if not values:
        return {"mean": math.nan, "bottom_decile": math.nan}
    worst = values[: max(1, math.ceil(len(values) / 10))]
    return {"mean": sum(values) / len(values), "bottom_decile": sum(worst) / len(worst)}


def versions() -> dict[str, str]:
    """Packages that a result depends on."""
    return {name: metadata.version(name) for name in ("torch", "numpy")}


def _proposer(space: Space, config: HPNConfig) -> Callable[[int], tuple[Config, Callable[[float], None]]]:
    """``propose(number) -> config, report``; the same proposals for the same reports."""
    if config.method == "tpe":
        return _tpe(space, config.seed)

    def propose(number: int) -> tuple[Config, Callable[[float], None]]:
        generator = generator_for(config.seed, "arm", number)
        on_grid = config.policy == "categorical"
        actions = [
            float(torch.randint(len(grid), (), generator=generator))
            if on_grid or hasattr(dimension, "choices")
            else float(torch.rand((), generator=generator))
            for grid, dimension in zip(space.grids(), space.dimensions.values(), strict=True)
        ]
        return space.config(actions, on_grid=on_grid), lambda value: None

    return propose


def _tpe(space: Space, seed: int) -> Callable[[int], tuple[Config, Callable[[float], None]]]:
    try:
        import optuna
    except ImportError as error:
        raise ImportError("method='tpe' needs optuna; run: pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))

    def propose(number: int) -> tuple[Config, Callable[[float], None]]:
        trial = study.ask()
        return space.suggest(trial), lambda value: study.tell(trial, max(value, -1e9))

    return propose
