"""A client that trains with transformers' ``Trainer``: PEFT models, collators and callbacks as anywhere."""

import contextlib
import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from hf_plugins.rounds.training import add_terms_
from hf_plugins.rounds.update import ClientFailed, Config, GradientTerm, Job, Update
from hf_plugins.rounds.vector import TrainableVector

Prepare = Callable[[nn.Module, TrainingArguments, Job], None]
"""Last change of model and arguments before a client trains: how a method applies what is no argument."""
_KEEP = ("none", "last", "full")
# Keys of a config that this client reads itself; all other keys without a dot are fields of the arguments.
_OWN = "keep_gradient"


class TrainerClient:
    """A client whose round is one ``Trainer.train()`` on the resident model.

    Args:
        client_id: Number of the client, unique.
        train_dataset: Its records.
        arguments: Options of the local training. Logging, saving and evaluation while training are off;
            the seeds are the job's.
        trainer_kwargs: More arguments of the trainer, such as ``data_collator``.
        terms: Additions to each step's gradient; they come after ``max_grad_norm``.
        callbacks: Makes the callbacks of one round; None: no more than the engine's own.
        prepare: Last change before training; see `Prepare`.
        eval_dataset: Records that `evaluate` uses, or None.
        trainer_class: ``Trainer`` or a subclass.
    """

    def __init__(
        self,
        client_id: int,
        train_dataset: Any,
        arguments: TrainingArguments,
        *,
        trainer_kwargs: dict[str, Any] | None = None,
        terms: Sequence[GradientTerm] = (),
        callbacks: Callable[[Job], Sequence[TrainerCallback]] | None = None,
        prepare: Prepare | None = None,
        eval_dataset: Any = None,
        trainer_class: type[Trainer] = Trainer,
    ) -> None:
        self.client_id = client_id
        self.train_dataset = train_dataset
        self.arguments = arguments
        self.trainer_kwargs = dict(trainer_kwargs or {})
        self.terms = tuple(terms)
        self.callbacks = callbacks
        self.prepare = prepare
        self.eval_dataset = eval_dataset
        self.trainer_class = trainer_class

    def train(self, weights: TrainableVector, job: Job) -> Update:
        """Train on this client's records, from the parameters that ``weights`` holds now.

        Args:
            weights: The resident model; holds the local parameters afterwards.
            job: Round, seed and config; keys without a dot are fields of ``TrainingArguments``.

        Returns:
            The difference, with ``metrics["loss"]``: the trainer's training loss.
        """
        keep = str(job.config.get(_OWN, "none"))
        if keep not in _KEEP:
            raise ValueError(f"keep_gradient must be one of {', '.join(_KEEP)}; got {keep!r}.")
        start_D = weights.read()
        metrics: dict[str, float] = {}
        gradient = None
        if len(self.train_dataset):
            hook = _StepHook(weights, self.terms, job.config, keep_last=keep == "last")
            with _global_generators(), torch.enable_grad():
                trainer = self._trainer(weights.model, job, [hook])
                done = trainer.train()
                metrics = {"loss": float(done.training_loss)}
                gradient = hook.gradient if keep != "full" else _full_gradient(trainer, weights)
        return Update(
            client_id=self.client_id,
            round_index=job.round_index,
            vector_D=weights.read() - start_D,
            num_examples=len(self.train_dataset),
            metrics=metrics,
            gradient_D=gradient,
        )

    def evaluate(self, weights: TrainableVector, job: Job) -> dict[str, float]:
        """The trainer's ``evaluate`` on the validation records, keys without ``eval_``.

        Raises:
            ClientFailed: If this client has none.
        """
        if self.eval_dataset is None or not len(self.eval_dataset):
            raise ClientFailed(f"client {self.client_id} has no validation records")
        with _global_generators():
            found = self._trainer(weights.model, job, []).evaluate(self.eval_dataset)
        figures = {k.removeprefix("eval_"): float(v) for k, v in found.items() if isinstance(v, int | float)}
        return {**figures, "num_examples": float(len(self.eval_dataset))}

    def _trainer(self, model: nn.Module, job: Job, hooks: list[TrainerCallback]) -> Trainer:
        args = arguments_with(self.arguments, job.config)
        args.seed = args.data_seed = job.seed % 2**31
        if self.prepare is not None:
            self.prepare(model, args, job)
        more = list(self.callbacks(job)) if self.callbacks else []
        trainer = self.trainer_class(
            model=model,
            args=args,
            train_dataset=self.train_dataset,
            callbacks=[*more, *hooks],
            **self.trainer_kwargs,
        )
        for noisy in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(noisy)
        return trainer


def arguments_with(arguments: TrainingArguments, config: Config) -> TrainingArguments:
    """Arguments of one client in one round: a copy, quiet, with the config's keys set and read back.

    Raises:
        ValueError: If a key is no field of ``TrainingArguments``.
    """
    args = copy.copy(arguments)
    args.save_strategy = args.eval_strategy = args.logging_strategy = "no"
    args.report_to, args.disable_tqdm = [], True
    known = [f.name for f in fields(arguments)]
    for name, value in config.items():
        if "." in name or name == _OWN:
            continue
        if name not in known:
            near = get_close_matches(name, known, n=3)
            raise ValueError(
                f"config key {name!r} is no field of TrainingArguments"
                + (f"; did you mean {', '.join(near)}?" if near else "; see its documentation.")
            )
        setattr(args, name, value)
        if getattr(args, name) != value:
            raise ValueError(
                f"config key {name!r} did not take: {value!r} was set, {getattr(args, name)!r} holds."
            )
    return args


class _StepHook(TrainerCallback):
    """Reads the last step's gradient and adds the terms, just before the optimizer steps."""

    def __init__(
        self, weights: TrainableVector, terms: Sequence[GradientTerm], config: Config, *, keep_last: bool
    ) -> None:
        self.weights, self.terms, self.config, self.keep_last = weights, terms, config, keep_last
        self.start = [p.detach().clone() for p in weights.parameters]
        self.gradient: Tensor | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.keep_last and state.global_step == state.max_steps - 1:
            self.gradient = self.weights.read_gradient()
        add_terms_(self.weights.parameters, self.start, self.terms, self.config)


def _full_gradient(trainer: Trainer, weights: TrainableVector) -> Tensor:
    """Gradient of the mean loss over all records at the final parameters."""
    model = weights.model
    model.zero_grad(set_to_none=True)
    loader = trainer.get_train_dataloader()
    for inputs in loader:
        loss = trainer.compute_loss(model, trainer._prepare_inputs(inputs))
        assert isinstance(loss, Tensor), "without return_outputs a trainer returns the loss alone"
        (loss / len(loader)).backward()
    return weights.read_gradient()


@contextlib.contextmanager
def _global_generators() -> Iterator[None]:
    """A trainer seeds Python's and NumPy's global generators; they belong to the caller."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
