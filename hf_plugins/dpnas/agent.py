"""The search: DP-SGD on one path at a time, a controller rewarded by noisy counts, an honest privacy
account.
"""

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_plugins.accounting import Ledger, Release
from hf_plugins.dpnas.config import SHAPES, DPNASSearchConfig
from hf_plugins.dpnas.controller import Baseline, Controller, reinforce_loss
from hf_plugins.dpnas.genotypes import Genotype
from hf_plugins.dpnas.path_step import clipped_gradient_sum, noised_mean, noisy_accuracy, poisson_batch
from hf_plugins.dpnas.supernet import Supernet, forget_inactive_
from hf_plugins.whole_files import replacing, write_json

logger = logging.getLogger(__name__)

STATE = "search_state.pt"
RESULT = "search.json"


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found and what it cost."""

    genotype: Genotype
    """The best candidate."""
    candidates: list[tuple[Genotype, float]]
    """All candidates with their noisy accuracy under the shared weights, best first."""
    epsilon: float
    """Epsilon of the search for one record, whichever split it is in; infinity without noise."""
    ledgers: dict[str, Ledger]
    """What the records of each split paid: ``weights`` and ``reward``. The splits are disjoint, so the
    larger epsilon holds for all; training on the same records comes on top."""
    journal: list[dict[str, Any]] = field(default_factory=list)
    """One entry a controller step: step, reward, entropy, cell."""

    @property
    def private(self) -> bool:
        """Whether the cell itself is covered by a finite epsilon."""
        return math.isfinite(self.epsilon)


class DPNASSearch:
    """One search over private images, resumable between any two saved states.

    Args:
        config: Options.
        images: (N, C, H, W) float, already normalised.
        labels: (N,) int64 class numbers.

    Raises:
        ValueError: If images and labels do not pair, have the wrong size, or are too few to be split.
    """

    def __init__(self, config: DPNASSearchConfig, images: Tensor, labels: Tensor) -> None:
        shape = SHAPES[config.shape]
        wanted = (shape["in_channels"], shape["image_size"], shape["image_size"])
        if tuple(images.shape[1:]) != wanted or len(images) != len(labels):
            raise ValueError(
                f"shape={config.shape!r} takes images of {wanted} and one label each; got images "
                f"{tuple(images.shape)} and {len(labels)} labels."
            )
        num_reward = round(config.reward_split * len(images))
        if not 0 < num_reward < len(images):
            raise ValueError(
                f"{len(images)} images cannot be split with reward_split={config.reward_split}; "
                "both parts need some."
            )
        self.config = config
        self.generator = torch.Generator().manual_seed(config.seed)
        order = torch.randperm(len(images), generator=self.generator)
        self.reward_data = images[order[:num_reward]], labels[order[:num_reward]]
        self.weight_data = images[order[num_reward:]], labels[order[num_reward:]]
        self.supernet = Supernet(self.generator, groups=config.groups, fifth=config.space, **shape)
        self.controller = Controller(self.generator)
        self.baseline = Baseline()
        self.optimizer = torch.optim.SGD(
            self.supernet.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, config.num_steps, eta_min=config.final_learning_rate
        )
        self.controller_optimizer = torch.optim.Adam(
            self.controller.parameters(), lr=config.controller_learning_rate, betas=(0.5, 0.999)
        )
        self.ledgers = {"weights": Ledger(), "reward": Ledger()}
        self.journal: list[dict[str, Any]] = []
        self.step = 0

    def run(self, folder: Path, *, progress: Callable[[int, int], None] | None = None) -> SearchResult:
        """Search to the end, from the saved state in ``folder`` if there is one.

        Args:
            folder: Where the state and the result go.
            progress: Called with (steps done, steps in all) after every step.

        Returns:
            The best cell with its account.

        Raises:
            ValueError: If the folder holds the state of a search with other options.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.load(folder)
        while self.step < self.config.num_steps:
            self.train_weights()
            self.step += 1
            due = self.step > self.config.warmup_steps and self.step % self.config.reward_every == 0
            if due and self.config.strategy == "controller":
                self.train_controller()
            if self.step % self.config.save_steps == 0:
                self.save(folder)
            if progress:
                progress(self.step, self.config.num_steps)
        self.save(folder)
        result = self.choose()
        write_result(result, self.config, folder)
        return result

    def train_weights(self) -> None:
        """One DP-SGD step on the path of one proposed cell."""
        config = self.config
        images, labels = self.weight_data
        uniform = config.strategy == "random" or self.step < config.warmup_steps
        with torch.no_grad():
            genotype = self.controller.propose(self.generator, uniform=uniform).genotype
        network = self.supernet.network(genotype)
        batch = poisson_batch(len(images), config.sample_rate, self.generator)
        total, _ = clipped_gradient_sum(
            network,
            images[batch],
            labels[batch],
            max_grad_norm=config.max_grad_norm,
            chunk_size=config.chunk_size,
        )
        mean = noised_mean(
            total,
            noise_multiplier=config.noise_multiplier,
            max_grad_norm=config.max_grad_norm,
            expected_batch_size=config.sample_rate * len(images),
            generator=self.generator,
        )
        self.optimizer.zero_grad(set_to_none=True)
        active = dict(network.named_parameters())
        for name, parameter in active.items():
            parameter.grad = mean[name]
        self.optimizer.step()
        forget_inactive_(self.optimizer, list(active.values()))
        self.scheduler.step()
        self.ledgers["weights"].add(
            Release(noise_multiplier=config.noise_multiplier, num_steps=1, sample_rate=config.sample_rate)
        )

    def _reward(self, genotype: Genotype, sample_rate: float) -> float:
        images, labels = self.reward_data
        batch = poisson_batch(len(images), sample_rate, self.generator)
        noise = self.config.reward_noise_multiplier
        self.ledgers["reward"].add(Release(noise_multiplier=noise, num_steps=1, sample_rate=sample_rate))
        return noisy_accuracy(
            self.supernet.network(genotype),
            images[batch],
            labels[batch],
            expected_size=sample_rate * len(images),
            noise_multiplier=noise,
            generator=self.generator,
        )

    def train_controller(self) -> None:
        """One REINFORCE step."""
        proposal = self.controller.propose(self.generator)
        reward = self._reward(proposal.genotype, self.config.reward_sample_rate)
        loss = reinforce_loss(
            proposal, self.baseline.advantage(reward), entropy_weight=self.config.entropy_weight
        )
        self.controller_optimizer.zero_grad()
        loss.backward()
        self.controller_optimizer.step()
        self.journal.append(
            {
                "step": self.step,
                "reward": reward,
                "entropy": proposal.entropy.item(),
                "operations": list(proposal.genotype.operations),
            }
        )

    def choose(self) -> SearchResult:
        """Propose the candidates, score each on the whole reward split (with noise), rank them."""
        uniform = self.config.strategy == "random"
        with torch.no_grad():
            proposed = [
                self.controller.propose(self.generator, uniform=uniform).genotype
                for _ in range(self.config.num_candidates)
            ]
        scored = sorted(((cell, self._reward(cell, 1.0)) for cell in proposed), key=lambda pair: -pair[1])
        epsilon = max(ledger.epsilon(delta=self.config.delta) for ledger in self.ledgers.values())
        if not math.isfinite(epsilon):
            logger.warning(
                "architecture not private: reward_noise_multiplier or noise_multiplier is 0, so the cell "
                "is a function of private records without noise. Set both above 0, or search public data."
            )
        return SearchResult(
            genotype=scored[0][0],
            candidates=scored,
            epsilon=epsilon,
            ledgers=self.ledgers,
            journal=self.journal,
        )

    def save(self, folder: Path) -> None:
        """Write the whole state next to its place, then rename."""
        state = {
            "config": json.dumps(asdict(self.config), sort_keys=True),
            "step": self.step,
            "generator": self.generator.get_state(),
            "supernet": self.supernet.state_dict(),
            "controller": self.controller.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "controller_optimizer": self.controller_optimizer.state_dict(),
            "baseline": self.baseline.value,
            "ledgers": {name: ledger.state_dict() for name, ledger in self.ledgers.items()},
            "journal": self.journal,
        }
        with replacing(folder / STATE) as part, part.open("wb") as file:
            torch.save(state, file)

    def load(self, folder: Path) -> None:
        """Go on from the state in ``folder``; without one nothing happens.

        Raises:
            ValueError: If the state belongs to other options.
        """
        path = folder / STATE
        if not path.is_file():
            return
        state = torch.load(path, weights_only=True)
        ours = json.dumps(asdict(self.config), sort_keys=True)
        if state["config"] != ours:
            theirs = json.loads(state["config"])
            changed = [key for key, value in asdict(self.config).items() if theirs.get(key) != value]
            raise ValueError(
                f"{folder} holds a search with other options ({', '.join(changed)} differ); "
                "resume it with its own, or name another folder."
            )
        self.step = state["step"]
        self.generator.set_state(state["generator"])
        self.supernet.load_state_dict(state["supernet"])
        self.controller.load_state_dict(state["controller"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.controller_optimizer.load_state_dict(state["controller_optimizer"])
        self.baseline.value = state["baseline"]
        for name, ledger in self.ledgers.items():
            ledger.load_state_dict(state["ledgers"][name])
        self.journal = state["journal"]


def write_result(result: SearchResult, config: DPNASSearchConfig, folder: Path) -> Path:
    """Write ``search.json``: options, cell, candidates, account, journal."""
    record = {
        "config": asdict(config),
        "genotype": result.genotype.triples(),
        "cell": result.genotype.describe(),
        "private": result.private,
        "epsilon": result.epsilon if result.private else None,
        "delta": config.delta,
        "ledgers": {name: ledger.state_dict() for name, ledger in result.ledgers.items()},
        "candidates": [{"genotype": c.triples(), "noisy_accuracy": score} for c, score in result.candidates],
        "journal": result.journal,
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    path = folder / RESULT
    write_json(path, record)
    return path


def search(
    config: DPNASSearchConfig,
    images: Tensor,
    labels: Tensor,
    folder: str | Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> SearchResult:
    """Search a cell for DP training on private images; an interrupted search goes on when called again.

    Args:
        config: Options.
        images: (N, C, H, W) float images, already normalised.
        labels: (N,) int64 class numbers.
        folder: Where ``search_state.pt`` and ``search.json`` go.
        progress: Called with (steps done, steps in all).

    Returns:
        The best cell, all candidates, and what the search cost.

    Raises:
        ValueError: If images do not fit the shape, or the folder belongs to a search with other options.

    Source: DPNAS, arXiv 2110.08557, search strategy; the noise on rewards and the account are ours.
    """
    return DPNASSearch(config, images, labels).run(Path(folder), progress=progress)
