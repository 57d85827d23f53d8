"""The client's side: every hyper-parameter is set, watched while it acts, and reported as it was in force."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hf_plugins.hpn.embedding import ClientEncoding, Encoder, encode
from hf_plugins.hpn.space import Config, Space, Value
from hf_plugins.rounds import Client, ClientFailed, Job, TrainableVector, Update, generator_for, seed_for
from hf_plugins.rounds.vector import digest

PREFIX = "hpn."
"""Keys of a job's config that belong to this room."""
ENCODE = "hpn.encode"
"""Asks a client for its encoding instead of figures."""
VALUE, COUNT, APPLIED, ENCODING = "hpn.value", "hpn.num_validation", "hpn.applied.", "hpn.encoding."
"""Keys of what a client sends back."""


@dataclass
class Observed:
    """What really happened while a client trained, read from the live optimizer and model."""

    optimizer: str = ""
    """Class of the optimizer, in lower case."""
    groups: list[dict[str, Any]] = field(default_factory=list)
    """Options of its parameter groups at the first step."""
    num_steps: int = 0
    """Optimizer steps taken."""
    batch_size: int = 0
    """Records in the first forward pass."""
    num_records: int = 0
    """Records in all forward passes."""
    dropout: set[float] = field(default_factory=set)
    """Probabilities in force at the first forward pass, of modules and of a transformers config."""
    epoch: int = 0
    """Records of one pass over the client's data."""

    def option(self, name: str) -> float:
        """Largest value of an option over parameter groups: some groups are exempt from weight decay."""
        # A schedule keeps the rate that it starts from beside the current one.
        return max(group.get(f"initial_{name}", group.get(name, math.nan)) for group in self.groups)


@dataclass(frozen=True)
class Applier:
    """How one hyper-parameter reaches a client's training, and how to tell that it did."""

    read: Callable[[Observed], Value]
    """The value that was in force."""
    apply: Callable[[nn.Module, Value], None] | None = None
    """Sets it on the model; None: it is an option of the host's training and the job's config carries it."""


def _one(values: set[float]) -> Value:
    return next(iter(values)) if len(values) == 1 else str(sorted(values))


APPLIERS: dict[str, Applier] = {
    "learning_rate": Applier(lambda seen: seen.option("lr")),
    "weight_decay": Applier(lambda seen: seen.option("weight_decay")),
    "momentum": Applier(lambda seen: seen.option("momentum")),
    "optimizer": Applier(lambda seen: seen.optimizer),
    "num_steps": Applier(lambda seen: seen.num_steps),
    "max_steps": Applier(lambda seen: seen.num_steps),
    "num_epochs": Applier(lambda seen: seen.num_records / max(1, seen.epoch)),
    "num_train_epochs": Applier(lambda seen: seen.num_records / max(1, seen.epoch)),
    "batch_size": Applier(lambda seen: seen.batch_size),
    "per_device_train_batch_size": Applier(lambda seen: seen.batch_size),
    "dropout": Applier(
        lambda seen: _one(seen.dropout), lambda model, value: set_dropout_(model, float(value))
    ),
}
"""Hyper-parameters that a client knows how to apply; add your own with `register_applier`."""


def register_applier(name: str, applier: Applier) -> None:
    """Make a hyper-parameter known.

    Raises:
        ValueError: If there is one of that name.
    """
    if name in APPLIERS:
        raise ValueError(f"there is an applier for {name!r}; choose another name.")
    APPLIERS[name] = applier


def check_appliers(space: Space, appliers: Mapping[str, Applier] = APPLIERS) -> None:
    """Refuse a space that holds a hyper-parameter nobody applies; before any training.

    Raises:
        ValueError: If one has no applier.
    """
    unknown = [name for name in space.names if name not in appliers]
    if unknown:
        raise ValueError(
            f"no applier for {', '.join(unknown)}; there are {', '.join(sorted(appliers))}. Rename, or "
            "register_applier(name, Applier(read=..., apply=...)) before the run: what cannot be read back "
            "may never have acted."
        )


def job_config(config: Config, appliers: Mapping[str, Applier] = APPLIERS) -> dict[str, Any]:
    """A client's config as a job carries it: what is set on the model gets this room's prefix."""
    return {PREFIX + name if appliers[name].apply else name: value for name, value in config.items()}


def dropout_places(model: nn.Module) -> list[tuple[Any, str]]:
    """Where a model keeps dropout probabilities: dropout modules, numbers in other modules, its config."""
    places: list[tuple[Any, str]] = []
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            places.append((module, "p"))
            continue
        places += [(module, name) for name, value in vars(module).items() if _is_dropout(name, value)]
    config = getattr(model, "config", None)
    if config is not None:
        places += [(config, name) for name, value in vars(config).items() if _is_dropout(name, value)]
    return places


def _is_dropout(name: str, value: Any) -> bool:
    spelt = "dropout" in name or name.endswith("_pdrop")
    # A classifier's dropout may be None: "as the others"; then its module says what holds.
    return spelt and isinstance(value, float)


def set_dropout_(model: nn.Module, probability: float) -> None:
    """Set every dropout of a model.

    Raises:
        ValueError: If it has none, or the probability is out of range.
    """
    if not 0 <= probability < 1:
        raise ValueError(f"dropout must lie in [0, 1); got {probability}.")
    places = dropout_places(model)
    if not places:
        raise ValueError(
            "this model has no dropout to set; take dropout out of the space, or add nn.Dropout modules."
        )
    for owner, name in places:
        setattr(owner, name, probability)


@contextlib.contextmanager
def observe(model: nn.Module, epoch: int = 0) -> Iterator[Observed]:
    """Watch one training of a model: optimizer, steps, records, dropout.

    Works for every host, because it looks at PyTorch's own optimizer and at the model's forward passes.
    """
    seen = Observed(epoch=epoch)
    own = {id(p) for p in model.parameters()}

    def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            return
        if not seen.groups:
            seen.optimizer = type(optimizer).__name__.lower()
            seen.groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        seen.num_steps += 1

    def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not module.training:
            return
        count = _records((*args, *kwargs.values()))
        if not seen.num_records:
            seen.batch_size = count
            seen.dropout = {float(getattr(owner, name)) for owner, name in dropout_places(module)}
        seen.num_records += count

    handles = [
        register_optimizer_step_pre_hook(before_step),
        model.register_forward_pre_hook(before_forward, with_kwargs=True),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _records(values: Sequence[Any]) -> int:
    """Length of the first tensor (or list) that a forward pass was given."""
    for value in values:
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
        if isinstance(value, list | tuple | dict):
            return _records(tuple(value.values() if isinstance(value, dict) else value)) or len(value)
    return 0


def verified(config: Mapping[str, Any], seen: Observed, appliers: Mapping[str, Applier]) -> dict[str, float]:
    """Compare what was sent with what was in force.

    Args:
        config: A job's config.
        seen: From `observe`.
        appliers: The registry.

    Returns:
        ``hpn.applied.NAME`` to the value in force, for numbers.

    Raises:
        ClientFailed: If the client took no step, so that nothing can be said.
        RuntimeError: If a value did not act.
    """
    names = {key.removeprefix(PREFIX): value for key, value in config.items()}
    found: dict[str, float] = {}
    for name, value in names.items():
        if name not in appliers:
            continue
        if not seen.groups:
            raise ClientFailed("it took no optimizer step; has it any record?")
        actual = appliers[name].read(seen)
        if not _same(actual, value):
            raise RuntimeError(
                f"hyper-parameter {name!r} did not act: {value!r} was sent and {actual!r} was in force while "
                "the client trained. Mend its applier, or whatever overrides the value."
            )
        if isinstance(actual, int | float):
            found[APPLIED + name] = float(actual)
    return found


def _same(actual: Any, sent: Any) -> bool:
    if isinstance(sent, int | float) and isinstance(actual, int | float):
        return math.isclose(actual, sent, rel_tol=1e-9, abs_tol=1e-12)
    return str(actual) == str(sent)


class HPNClient:
    """Wraps any client of the round engine: applies and verifies its config, encodes, measures, adds noise.

    Args:
        inner: The client that trains: `TorchClient`, `TrainerClient`, or `RunnerClient` of this room.
        encoder: How it encodes itself; None: it cannot be asked to.
        examples: Inputs and labels that the encoding is made of; called once, when it is asked for.
        noise_multiplier: Of the encoding.
        metric: Figure of ``inner.evaluate`` that is the value.
        reward_noise_multiplier: Noise on each value that leaves, over 1 / records.
        secret: Seed of both noises; belongs to the client alone. One secret makes one encoding, so being
            asked twice does not cost twice.
        appliers: The registry.
    """

    def __init__(
        self,
        inner: Client,
        *,
        encoder: Encoder | None = None,
        examples: Callable[[], tuple[Tensor, Tensor]] | None = None,
        noise_multiplier: float = 0.0,
        metric: str = "accuracy",
        reward_noise_multiplier: float = 0.0,
        secret: int = 0,
        appliers: Mapping[str, Applier] = APPLIERS,
    ) -> None:
        self.inner = inner
        self.client_id = inner.client_id
        self.encoder = encoder
        self.examples = examples
        self.noise_multiplier = noise_multiplier
        self.metric = metric
        self.reward_noise_multiplier = reward_noise_multiplier
        self.secret = secret
        self.appliers = appliers

    def train(self, weights: TrainableVector, job: Job) -> Update:
        """Train under the job's config, verify it, and measure the local model.

        Returns:
            The inner client's update; its metrics also hold every value in force (``hpn.applied.*``) and the
            local model's figure (``hpn.value``), if this client can evaluate.
        """
        own = {k.removeprefix(PREFIX): v for k, v in job.config.items() if k.startswith(PREFIX)}
        inner_job = replace(job, config={k: v for k, v in job.config.items() if not k.startswith(PREFIX)})
        with self._applied(weights.model, own), observe(weights.model, self._epoch()) as seen:
            update = self.inner.train(weights, inner_job)
        if self.reward_noise_multiplier:
            # The training loss is a function of the records that no noise covers.
            update.metrics = {}
        update.metrics |= verified(job.config, seen, self.appliers)
        if torch.isfinite(update.vector_D).all():
            with contextlib.suppress(ClientFailed):
                update.metrics |= self._figures(weights, inner_job)
        return update

    def evaluate(self, weights: TrainableVector, job: Job) -> dict[str, float]:
        """The model's figure here, or this client's encoding if the job's config asks for it.

        Raises:
            ClientFailed: If there are no records to say it of.
        """
        if job.config.get(ENCODE):
            vector = self.encoding().vector.tolist()
            return {f"{ENCODING}{number:05d}": value for number, value in enumerate(vector)}
        return self._figures(weights, replace(job, config={}))

    def encoding(self) -> ClientEncoding:
        """This client's encoding; the same at every call.

        Raises:
            ClientFailed: If it was given no encoder or no examples.
        """
        if self.encoder is None or self.examples is None:
            raise ClientFailed(f"client {self.client_id} was given no encoder and examples")
        x_ND, labels_N = self.examples()
        return encode(
            x_ND,
            labels_N,
            self.encoder,
            noise_multiplier=self.noise_multiplier,
            generator=generator_for(self.secret, "encoding", self.client_id),
        )

    def _epoch(self) -> int:
        data = getattr(self.inner, "records", None)
        return len(data[0]) if data is not None else len(getattr(self.inner, "train_dataset", ()))

    @contextlib.contextmanager
    def _applied(self, model: nn.Module, own: Mapping[str, Value]) -> Iterator[None]:
        """Set on the shared model what this client asks for, and put its own values back."""
        for name in own:
            if name not in self.appliers or self.appliers[name].apply is None:
                known = ", ".join(sorted(n for n, a in self.appliers.items() if a.apply))
                raise ValueError(f"no applier sets {PREFIX}{name} on a model; there are {known}.")
        kept = [(owner, name, getattr(owner, name)) for owner, name in dropout_places(model)]
        for name, value in own.items():
            apply = self.appliers[name].apply
            assert apply is not None, "checked above"
            apply(model, value)
        try:
            yield
        finally:
            for owner, name, value in kept:
                setattr(owner, name, value)

    def _figures(self, weights: TrainableVector, job: Job) -> dict[str, float]:
        found = self.inner.evaluate(weights, job)
        if self.metric not in found:
            raise ValueError(
                f"metric={self.metric!r} is not among what the clients measure: {', '.join(sorted(found))}."
            )
        count = int(found.get("num_examples", 1))
        value = found[self.metric]
        if self.reward_noise_multiplier:
            # A seed of its own for every model and config: equal noise on two values would cancel.
            name = ("value", self.client_id, digest(weights.read()), *map(str, sorted(job.config.items())))
            noise = torch.randn((), generator=generator_for(self.secret, *name), dtype=torch.float64)
            value += float(noise) * self.reward_noise_multiplier / max(1, count)
        return {VALUE: value, COUNT: float(count)}


def secret_of(seed: int, client_id: int) -> int:
    """A client's secret in a simulation, where one process plays all clients."""
    return seed_for(seed, "hpn secret", client_id)
