"""A client that trains with mmengine's ``Runner``: any mmengine config, one runner for each round.

Clients that train with transformers' ``Trainer`` are the round engine's own `TrainerClient`; `HPNClient`
wraps both alike.
"""

import contextlib
import copy
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from mmengine.config import Config as RunnerConfig
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from hf_plugins.rounds import ClientFailed, Job, TrainableVector, Update

PATHS: dict[str, str] = {
    "learning_rate": "optim_wrapper.optimizer.lr",
    "weight_decay": "optim_wrapper.optimizer.weight_decay",
    "momentum": "optim_wrapper.optimizer.momentum",
    "max_steps": "train_cfg.max_iters",
    "num_epochs": "train_cfg.max_epochs",
    "batch_size": "train_dataloader.batch_size",
}
"""Where a hyper-parameter stands in a runner's config."""
_READ_AGAIN = ("compile", "activation_checkpointing", "efficient_conv_bn_eval")
_QUIET = {"checkpoint": None, "logger": None}
_PASSED = (
    "train_dataloader",
    "train_cfg",
    "optim_wrapper",
    "param_scheduler",
    "auto_scale_lr",
    "custom_hooks",
    "default_scope",
)


class _StartFrom(Hook):
    """Writes the round's model after mmengine has initialised weights, which it does in each ``train()``."""

    priority = "VERY_HIGH"

    def __init__(self, weights: TrainableVector, start_D: Tensor) -> None:
        self.weights, self.start_D = weights, start_D

    def before_train(self, runner: Runner) -> None:
        """Last moment before the first batch."""
        self.weights.write_(self.start_D)


class _QuickRunner(Runner):
    """Without the report on the machine that each runner logs: it starts compilers, and costs a second."""

    def _log_env(self, env_cfg: dict[str, Any]) -> None:
        """Nothing."""


class RunnerClient:
    """A client whose round is one ``Runner.train()`` on the resident model.

    Args:
        client_id: Number of the client, unique.
        cfg: A runner's config with this client's ``train_dataloader``; its ``model`` is not read, the
            resident one trains. Checkpoints and text logs of the runner are off.
        work_dir: Where the runner writes what it must.
        num_examples: Training records of this client.
        measure: ``measure(model) -> figures`` on this client's validation records, with ``num_examples``;
            None: it has none.
        paths: Name of a hyper-parameter to its place in the config.
    """

    def __init__(
        self,
        client_id: int,
        cfg: RunnerConfig,
        *,
        work_dir: str,
        num_examples: int,
        measure: Callable[[nn.Module], dict[str, float]] | None = None,
        paths: Mapping[str, str] = PATHS,
    ) -> None:
        self.client_id = client_id
        self.cfg = cfg
        self.work_dir = work_dir
        self.num_examples = num_examples
        self.measure = measure
        self.paths = dict(paths)

    def train(self, weights: TrainableVector, job: Job) -> Update:
        """Train on this client's records, from the parameters that ``weights`` holds now.

        Args:
            weights: The resident model; holds the local parameters afterwards.
            job: Round, seed and config; keys are names of ``paths``.

        Returns:
            The difference.
        """
        start_D = weights.read()
        with _global_generators():
            self._runner(weights, job, start_D).train()
        return Update(
            client_id=self.client_id,
            round_index=job.round_index,
            vector_D=weights.read() - start_D,
            num_examples=self.num_examples,
        )

    def evaluate(self, weights: TrainableVector, job: Job) -> dict[str, float]:
        """What ``measure`` says of the parameters that ``weights`` holds now.

        Raises:
            ClientFailed: If this client has no validation records.
        """
        if self.measure is None:
            raise ClientFailed(f"client {self.client_id} has no validation records")
        weights.model.eval()
        return self.measure(weights.model)

    def round_config(self, job: Job) -> RunnerConfig:
        """The runner's config of one round.

        Raises:
            ValueError: If a key has no place, or the config has not what the place belongs to.
        """
        cfg = copy.deepcopy(self.cfg)
        for name, value in job.config.items():
            if name not in self.paths:
                raise ValueError(
                    f"hyper-parameter {name!r} has no place in a runner's config; there are "
                    f"{', '.join(self.paths)}. Give RunnerClient paths={{...}} that name it."
                )
            path = self.paths[name]
            owner = path.rsplit(".", 1)[0]
            if cfg.get(owner.split(".")[0]) is None:
                raise ValueError(f"{name!r} belongs at {path}, but the config has no {owner.split('.')[0]}.")
            cfg.merge_from_dict({path: value})
        return cfg

    def _runner(self, weights: TrainableVector, job: Job, start_D: Tensor) -> Runner:
        cfg = self.round_config(job)
        given = {name: cfg.get(name) for name in _PASSED if cfg.get(name) is not None}
        given["custom_hooks"] = [*(given.get("custom_hooks") or []), _StartFrom(weights, start_D)]
        return _QuickRunner(
            model=weights.model,
            work_dir=self.work_dir,
            default_hooks={**dict(cfg.get("default_hooks") or {}), **_QUIET},
            randomness={"seed": job.seed % 2**31},
            log_level="ERROR",
            # One name a client: mmengine keeps a logger and a visualizer for each name until the end.
            experiment_name=f"hpn_client_{self.client_id}",
            # Only what the runner reads again: it prints its whole config twice, which can take seconds.
            cfg=RunnerConfig({name: cfg[name] for name in _READ_AGAIN if name in cfg}),
            **given,
        )


@contextlib.contextmanager
def _global_generators() -> Iterator[None]:
    """A runner seeds Python's and NumPy's global generators; they belong to the caller."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
