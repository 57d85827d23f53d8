"""A client that trains with a plain loop in PyTorch: no state between rounds, no framework."""

# Shapes: D trainable numbers of the model, B records of a batch.

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from hf_plugins.rounds.seeds import generator_for
from hf_plugins.rounds.update import ClientFailed, Config, GradientTerm, Job, Update
from hf_plugins.rounds.vector import TrainableVector

Batch = tuple[Tensor, ...]
Loss = Callable[[Callable[..., Any], Batch], Tensor]
"""``loss(model, batch) -> [B]``: one loss for each record. ``model`` may be any callable that behaves as the
model does; call it, and touch nothing else of it."""
Measure = Callable[[nn.Module, Batch], dict[str, float]]
"""``measure(model, records)``: figures of a model on records."""


class Client(Protocol):
    """What the engine needs of a client. It may hold data and must not hold state between rounds."""

    client_id: int

    def train(self, weights: TrainableVector, job: Job) -> Update:
        """Train from the parameters that ``weights`` holds now and return the difference."""
        ...

    def evaluate(self, weights: TrainableVector, job: Job) -> dict[str, float]:
        """Figures of the parameters that ``weights`` holds now on this client's validation records."""
        ...


@dataclass(kw_only=True, frozen=True)
class LocalTraining:
    """Options of a client's local training. Each is also a key of a client's config."""

    learning_rate: float = 0.1
    """Step size of the local optimizer, > 0."""
    learning_rate_decay: float = 1.0
    """Factor on the learning rate for each round done, in (0, 1]."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Local optimizer, made afresh in each round."""
    momentum: float = 0.0
    """Of sgd, in [0, 1)."""
    weight_decay: float = 0.0
    """Of the optimizer, >= 0."""
    batch_size: int = 32
    """Records of a local step; the last batch of an epoch may be smaller."""
    num_epochs: int = 1
    """Passes over the client's records."""
    num_steps: int = 0
    """Local steps; 0: as many as ``num_epochs`` gives."""
    max_grad_norm: float = 0.0
    """Bound on the norm of each step's gradient; 0: none."""
    keep_gradient: Literal["none", "last", "full"] = "none"
    """Gradient that the update carries: of the last step's batch, before that step (no extra pass), or of all
    records at the final parameters (one extra pass)."""

    def __post_init__(self) -> None:
        wrong = []
        if not self.learning_rate > 0 or not math.isfinite(self.learning_rate):
            wrong.append(f"learning_rate must be a finite number > 0; got {self.learning_rate}.")
        if not 0 < self.learning_rate_decay <= 1:
            wrong.append(f"learning_rate_decay must lie in (0, 1]; got {self.learning_rate_decay}.")
        for name, known in (("optimizer", ("sgd", "adamw")), ("keep_gradient", ("none", "last", "full"))):
            if getattr(self, name) not in known:
                wrong.append(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}.")
        if not 0 <= self.momentum < 1:
            wrong.append(f"momentum must lie in [0, 1); got {self.momentum}.")
        wrong += [
            f"{name} must be >= 0; got {getattr(self, name)}."
            for name in ("weight_decay", "num_steps", "max_grad_norm")
            if not getattr(self, name) >= 0
        ]
        wrong += [
            f"{name} must be >= 1; got {getattr(self, name)}."
            for name in ("batch_size", "num_epochs")
            if getattr(self, name) < 1
        ]
        if wrong:
            raise ValueError("LocalTraining: " + " | ".join(wrong))

    def with_config(self, config: Config) -> "LocalTraining":
        """These options, overridden by a client's config; keys with a dot are for others.

        Raises:
            ValueError: If a key is no option, or a value is out of range.
        """
        own = {name: value for name, value in config.items() if "." not in name}
        known = [f.name for f in fields(self)]
        for name in own:
            if name not in known:
                near = get_close_matches(name, known, n=1)
                raise ValueError(
                    f"config key {name!r} is no option of local training; it has {', '.join(known)}."
                    + (f" Did you mean {near[0]!r}?" if near else "")
                )
            default = getattr(LocalTraining, name)
            fits = isinstance(own[name], str if isinstance(default, str) else int | float)
            if not fits or (isinstance(default, int) and not isinstance(own[name], int)):
                raise ValueError(
                    f"config key {name!r} needs a value like {default!r}; got {own[name]!r}. "
                    "YAML reads 1e-3 as text: write 1.0e-3."
                )
        return replace(self, **own)  # type: ignore[arg-type]


def batches(num_records: int, training: LocalTraining, seed: int) -> list[Tensor]:
    """Indices of the records of each local step: every epoch in an order of its own."""
    if num_records == 0:
        return []
    per_epoch = math.ceil(num_records / training.batch_size)
    steps = training.num_steps or training.num_epochs * per_epoch
    generator = generator_for(seed, "batches")
    found: list[Tensor] = []
    while len(found) < steps:
        found += torch.randperm(num_records, generator=generator).split(training.batch_size)
    return found[:steps]


class TorchClient:
    """A client whose records are tensors and whose training is a plain loop.

    Args:
        client_id: Number of the client, unique.
        records: Tensors with one row for each record, for example ``(images, labels)``.
        loss: Loss of each record; see `Loss`.
        training: Options; a job's config overrides them.
        terms: Additions to each step's gradient; see `GradientTerm`.
        prepare: Last change of the resident model before a job, or None: how a method applies what is no
            option of local training. It must set what it sets in every job: the model is shared.
        validation: Records that `evaluate` uses, or None.
        measure: Figures that `evaluate` returns besides the mean loss, or None.
    """

    def __init__(
        self,
        client_id: int,
        records: Batch,
        *,
        loss: Loss,
        training: LocalTraining | None = None,
        terms: Sequence[GradientTerm] = (),
        prepare: Callable[[nn.Module, Job], None] | None = None,
        validation: Batch | None = None,
        measure: Measure | None = None,
    ) -> None:
        if len({len(tensor) for tensor in records}) != 1:
            raise ValueError(
                "records must be tensors of one length, one row for each record; got lengths "
                f"{[len(tensor) for tensor in records]}."
            )
        self.client_id = client_id
        self.records = records
        self.loss = loss
        self.training = training or LocalTraining()
        self.terms = tuple(terms)
        self.prepare = prepare
        self.validation = validation
        self.measure = measure

    def train(self, weights: TrainableVector, job: Job) -> Update:
        """Train on this client's records, from the parameters that ``weights`` holds now.

        Args:
            weights: The resident model; holds the local parameters afterwards.
            job: Round, seed and config.

        Returns:
            The difference, with ``metrics["loss"]``: mean training loss over the local steps.
        """
        options = self.training.with_config(job.config)
        if self.prepare is not None:
            self.prepare(weights.model, job)
        params = weights.parameters
        start = [p.detach().clone() for p in params]
        optimizer = make_optimizer(params, options, job.round_index)
        losses, gradient = [], None
        plan = batches(len(self.records[0]), options, job.seed)
        weights.model.train()
        for number, index in enumerate(plan):
            optimizer.zero_grad(set_to_none=True)
            loss = self.loss(weights.model, tuple(t[index] for t in self.records)).mean()
            loss.backward()
            losses.append(loss.detach())
            if options.keep_gradient == "last" and number == len(plan) - 1:
                gradient = weights.read_gradient()
            if options.max_grad_norm:
                nn.utils.clip_grad_norm_(params, options.max_grad_norm)
            add_terms_(params, start, self.terms, job.config)
            optimizer.step()
        if options.keep_gradient == "full" and plan:
            gradient = self._full_gradient(weights, options.batch_size)
        with torch.no_grad():
            delta = torch.cat([(p - s).float().reshape(-1) for p, s in zip(params, start, strict=True)])
        return Update(
            client_id=self.client_id,
            round_index=job.round_index,
            vector_D=delta.cpu(),
            num_examples=len(self.records[0]),
            metrics={"loss": float(torch.stack(losses).mean())} if losses else {},
            gradient_D=gradient,
        )

    def _full_gradient(self, weights: TrainableVector, batch_size: int) -> Tensor:
        weights.model.zero_grad(set_to_none=True)
        count = len(self.records[0])
        for index in torch.arange(count).split(batch_size):
            loss = self.loss(weights.model, tuple(t[index] for t in self.records))
            (loss.sum() / count).backward()
        return weights.read_gradient()

    def evaluate(self, weights: TrainableVector, job: Job) -> dict[str, float]:
        """Mean loss and ``measure`` on the validation records.

        Raises:
            ClientFailed: If this client has none.
        """
        if self.validation is None or not len(self.validation[0]):
            raise ClientFailed(f"client {self.client_id} has no validation records")
        weights.model.eval()
        with torch.no_grad():
            loss = float(self.loss(weights.model, self.validation).mean())
            more = self.measure(weights.model, self.validation) if self.measure else {}
        return {"loss": loss, "num_examples": float(len(self.validation[0])), **more}


def make_optimizer(
    params: Sequence[Tensor], options: LocalTraining, round_index: int
) -> torch.optim.Optimizer:
    """A fresh optimizer with the learning rate of the round."""
    rate = options.learning_rate * options.learning_rate_decay**round_index
    if options.optimizer == "sgd":
        return torch.optim.SGD(params, lr=rate, momentum=options.momentum, weight_decay=options.weight_decay)
    return torch.optim.AdamW(params, lr=rate, weight_decay=options.weight_decay)


def add_terms_(
    params: Sequence[Tensor], start: Sequence[Tensor], terms: Sequence[GradientTerm], config: Config
) -> None:
    """Add what each term asks for to the gradients, in place."""
    if not terms:
        return
    with torch.no_grad():
        delta = [p.detach() - s for p, s in zip(params, start, strict=True)]
        for term in terms:
            additions = term(delta, config, 0)
            if additions is None:
                continue
            for p, addition in zip(params, additions, strict=True):
                p.grad = addition.to(p.dtype) if p.grad is None else p.grad.add_(addition)
