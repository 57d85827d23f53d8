"""The round engine: draw a cohort, hand out jobs, check the answers, aggregate, save."""

# Shapes: D trainable numbers of the model.

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from hf_plugins.rounds.cohort import Sampling
from hf_plugins.rounds.seeds import seed_for
from hf_plugins.rounds.storage import check_same_settings, load_checkpoint, save_checkpoint, write_metrics
from hf_plugins.rounds.transport import Transport
from hf_plugins.rounds.update import (
    Aggregate,
    Aggregator,
    Config,
    Configure,
    Dropped,
    Job,
    RoundContext,
    Update,
    weighted_average,
)


class Stateful(Protocol):
    """A part of a method that a checkpoint carries: plain values and tensors only."""

    def state_dict(self) -> dict[str, Any]:
        """Everything it needs to go on."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on from a saved state."""
        ...


@dataclass(kw_only=True)
class Outcome:
    """One round, done."""

    vector_D: Tensor
    """The new global model."""
    context: RoundContext
    """Cohort, dropped clients, metrics of each client."""
    metrics: dict[str, float]
    """Of the round: the aggregator's, and counts and time under ``rounds/``."""


class RoundEngine:
    """Runs rounds over any `Transport`; the same on one machine and on many.

    Args:
        transport: Clients and the way to them.
        initial_D: Global model at the start; ``TrainableVector(model).read()``.
        aggregate: What to make of the updates; see `Aggregator`.
        sampling: Who takes part.
        seed: Of every draw of the run.
        configure: Config of each client in each round, or None for none.
        evaluate: ``evaluate(vector_D) -> figures`` of the global model, or None.
        evaluate_every: Rounds between evaluations; the last round is always evaluated.
        stateful: Parts that checkpoints carry, by name: a ledger, a policy.
        folder: Where checkpoints and ``metrics.jsonl`` go; None keeps nothing.
        settings: Plain values that a resumed run must share with the saved one.
        save_every: Rounds between checkpoints. More than one is safe only where a repeated round is the same
            round, which seeded randomness gives.
        on_round: Called with the round's row of metrics after it is saved.
        hidden: Beginnings of metric names that are kept out of history, log and trackers.
        progress: Show a bar (only where there is a terminal).
    """

    def __init__(
        self,
        transport: Transport,
        initial_D: Tensor,
        *,
        aggregate: Aggregator = weighted_average,
        sampling: Sampling | None = None,
        seed: int = 0,
        configure: Configure | None = None,
        evaluate: Callable[[Tensor], dict[str, float]] | None = None,
        evaluate_every: int = 1,
        stateful: Mapping[str, Stateful] | None = None,
        folder: Path | str | None = None,
        settings: Mapping[str, Any] | None = None,
        save_every: int = 1,
        on_round: Sequence[Callable[[dict[str, Any]], None]] = (),
        hidden: Sequence[str] = (),
        progress: bool = True,
    ) -> None:
        if min(evaluate_every, save_every) < 1:
            raise ValueError(
                f"evaluate_every and save_every count rounds and must be >= 1; got {evaluate_every} and "
                f"{save_every}."
            )
        self.transport = transport
        self.vector_D = initial_D.detach().float().clone()
        self.aggregate = aggregate
        self.sampling = sampling or Sampling()
        self.seed = seed
        self.configure = configure
        self.evaluate = evaluate
        self.evaluate_every = evaluate_every
        self.stateful = dict(stateful or {})
        self.folder = Path(folder) if folder is not None else None
        self.settings = {"seed": seed, **(settings or {})}
        self.save_every = save_every
        self.on_round = list(on_round)
        self.hidden = tuple(hidden)
        self.progress = progress
        self.round_index = 0
        self.history: list[dict[str, Any]] = []

    def step(
        self,
        start_D: Tensor,
        round_index: int,
        *,
        configure: Configure | None = None,
        cohort: Sequence[int] | None = None,
        aggregate: Aggregator | None = None,
    ) -> Outcome:
        """One round from any model, changing nothing of the engine.

        Args:
            start_D: Model that the clients start from.
            round_index: Decides cohort, batches and noise together with the seed.
            configure: Instead of the engine's.
            cohort: These clients, instead of a draw.
            aggregate: Instead of the engine's.

        Returns:
            The outcome; two calls with the same arguments give the same one.
        """
        began = time.perf_counter()
        context, jobs = self.begin(start_D, round_index, configure=configure, cohort=cohort)
        answers = self.transport.train(jobs, context)
        outcome = self.complete(context, answers, aggregate=aggregate)
        outcome.metrics["rounds/seconds"] = time.perf_counter() - began
        return outcome

    def begin(
        self,
        start_D: Tensor,
        round_index: int,
        *,
        configure: Configure | None = None,
        cohort: Sequence[int] | None = None,
    ) -> tuple[RoundContext, list[Job]]:
        """First half of `step`: who takes part and what each shall do."""
        context = self._context(start_D, round_index, cohort)
        configure = configure or self.configure
        return context, [self._job(context, client_id, configure) for client_id in context.cohort]

    def complete(
        self,
        context: RoundContext,
        answers: Iterable[Update | Dropped],
        *,
        aggregate: Aggregator | None = None,
    ) -> Outcome:
        """Second half of `step`: what becomes of the answers, which come in the order of the jobs."""
        done = (aggregate or self.aggregate)(checked(answers, context), context)
        metrics = {
            **done.metrics,
            "rounds/cohort": float(len(context.cohort)),
            "rounds/dropped": float(len(context.dropped)),
            **_mean_metrics(context.updates),
        }
        return Outcome(vector_D=self._moved(context, done), context=context, metrics=metrics)

    def _context(self, start_D: Tensor, round_index: int, cohort: Sequence[int] | None) -> RoundContext:
        ids = self.transport.client_ids()
        drawn = (
            self.sampling.draw(ids, seed=self.seed, round_index=round_index)
            if cohort is None
            else sorted(cohort)
        )
        return RoundContext(
            round_index=round_index, seed=self.seed, num_clients=len(ids), cohort=drawn, start_D=start_D
        )

    def _job(self, context: RoundContext, client_id: int, configure: Configure | None) -> Job:
        return Job(
            client_id=client_id,
            round_index=context.round_index,
            seed=seed_for(self.seed, "client", context.round_index, client_id),
            config=dict(configure(context, client_id)) if configure else {},
        )

    def _moved(self, context: RoundContext, done: Aggregate) -> Tensor:
        moved = context.start_D + done.step_D
        if not bool(torch.isfinite(moved).all()):
            raise RuntimeError(
                f"round {context.round_index}: the new model is not finite, so the run stops; the last "
                "checkpoint still holds the model before. Lower the learning rates or bound the updates."
            )
        return moved

    def run(self, num_rounds: int, *, resume: bool = True) -> list[dict[str, Any]]:
        """Run until ``num_rounds`` rounds are done in all.

        Args:
            num_rounds: Rounds of the whole run, those of a checkpoint included.
            resume: Go on from the folder's checkpoint if there is one.

        Returns:
            One row of metrics for each round.

        Raises:
            ValueError: If the folder's checkpoint was made with other settings.
            RuntimeError: If the model is no longer finite.
        """
        if resume and self.round_index == 0:
            self.resume()
        bar = tqdm(total=num_rounds, initial=self.round_index, disable=None if self.progress else True)
        with bar:
            while self.round_index < num_rounds:
                row = self._one_round(last=self.round_index + 1 == num_rounds)
                bar.set_postfix({k.split("/")[-1]: f"{v:.4g}" for k, v in _shown(row)}, refresh=False)
                bar.update()
        return self.history

    def _one_round(self, *, last: bool) -> dict[str, Any]:
        outcome = self.step(self.vector_D, self.round_index)
        row: dict[str, Any] = {"round": self.round_index + 1, **outcome.metrics}
        reasons = [d.reason for d in outcome.context.dropped]
        row |= {f"rounds/dropped/{reason}": float(reasons.count(reason)) for reason in sorted(set(reasons))}
        if self.evaluate is not None and (last or (self.round_index + 1) % self.evaluate_every == 0):
            row |= self.evaluate(outcome.vector_D)
        row = {name: value for name, value in row.items() if not name.startswith(self.hidden)}
        self.vector_D = outcome.vector_D
        self.round_index += 1
        self.history.append(row)
        if last or self.round_index % self.save_every == 0:
            self.save()
        for call in self.on_round:
            call(row)
        return row

    def save(self) -> None:
        """Write a checkpoint, if the run has a folder."""
        if self.folder is None:
            return
        state = {
            "settings": self.settings,
            "round_index": self.round_index,
            "vector_D": self.vector_D,
            "history": self.history,
            "stateful": {name: part.state_dict() for name, part in self.stateful.items()},
        }
        save_checkpoint(self.folder, state)
        write_metrics(self.folder, self.history)

    def resume(self) -> bool:
        """Go on from the folder's checkpoint.

        Returns:
            Whether there was one.

        Raises:
            ValueError: If it was made with other settings, or for another model.
        """
        state = load_checkpoint(self.folder) if self.folder is not None else None
        if state is None or self.folder is None:
            return False
        check_same_settings(state["settings"], self.settings, self.folder)
        if state["vector_D"].shape != self.vector_D.shape:
            raise ValueError(
                f"the checkpoint in {self.folder} holds {state['vector_D'].numel()} numbers and this model "
                f"has {self.vector_D.numel()}; build the model as the run did."
            )
        if set(state["stateful"]) != set(self.stateful):
            raise ValueError(
                f"the checkpoint in {self.folder} carries the state of {sorted(state['stateful'])}, this "
                f"engine has {sorted(self.stateful)}; give it the same parts."
            )
        for name, part in self.stateful.items():
            part.load_state_dict(state["stateful"][name])
        self.vector_D = state["vector_D"]
        self.round_index = state["round_index"]
        self.history = state["history"]
        write_metrics(self.folder, self.history)
        return True

    def evaluate_clients(
        self,
        vector_D: Tensor,
        client_ids: Iterable[int] | None = None,
        *,
        configs: Mapping[int, Config] | None = None,
    ) -> dict[int, dict[str, float]]:
        """Figures of a model from each client's own validation records.

        Args:
            vector_D: The model.
            client_ids: Whom to ask; None: all.
            configs: Config of each client; absent ones get an empty one.

        Returns:
            ``{client_id: figures}``, without clients that have no validation records.
        """
        ids = sorted(self.transport.client_ids() if client_ids is None else client_ids)
        jobs = [
            Job(
                client_id=i,
                round_index=self.round_index,
                seed=seed_for(self.seed, "evaluate", i),
                config=dict((configs or {}).get(i, {})),
            )
            for i in ids
        ]
        return dict(self.transport.evaluate(jobs, vector_D))


def checked(answers: Iterable[Update | Dropped], context: RoundContext) -> Iterator[Update]:
    """Updates that may count, one at a time; the others are noted in ``context.dropped`` with the reason.

    Args:
        answers: As they come.
        context: The round; ``dropped`` and ``updates`` are filled.
    """
    for answer in answers:
        found = answer if isinstance(answer, Dropped) else fault(answer, context)
        if found is not None:
            context.dropped.append(found)
            continue
        assert isinstance(answer, Update), "what is not dropped is an update"
        context.updates[answer.client_id] = {**answer.metrics, "num_examples": float(answer.num_examples)}
        yield answer


def fault(update: Update, context: RoundContext) -> Dropped | None:
    """Why an update must not count, or None."""

    def because(reason: str, detail: str) -> Dropped:
        return Dropped(client_id=update.client_id, reason=reason, detail=detail)

    if update.vector_D.shape != context.start_D.shape:
        return because("wrong shape", f"{tuple(update.vector_D.shape)}, not {tuple(context.start_D.shape)}")
    if update.round_index != context.round_index:
        return because("out of date", f"answers round {update.round_index}, not {context.round_index}")
    if update.base is not None and update.base != context.base:
        return because("out of date", "started from another model than the one sent")
    if not bool(torch.isfinite(update.vector_D).all()):
        return because("not finite", "the update holds NaN or infinity")
    if update.num_examples < 0 or not math.isfinite(update.num_examples):
        return because("bad size", f"claims {update.num_examples} records")
    if update.gradient_D is not None:
        return because(
            "leaked gradient", "a gradient came with the update; the client's last touch is missing"
        )
    return None


def _mean_metrics(updates: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Plain mean over clients of what all of them report."""
    if not updates:
        return {}
    shared = set.intersection(*(set(m) for m in updates.values())) - {"num_examples"}
    return {
        f"clients/{name}": sum(m[name] for m in updates.values()) / len(updates) for name in sorted(shared)
    }


def _shown(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    """What fits beside a progress bar."""
    return [(k, v) for k, v in row.items() if isinstance(v, float) and "rounds/" not in k][:5]
