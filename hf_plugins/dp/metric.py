"""Empirical lower bound on a trainer's epsilon: train it once on canaries, guess which ones it saw."""

import json
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainingArguments, default_data_collator

from hf_plugins.dp.config import DPConfig
from hf_plugins.dp.one_run_audit import AuditResult, audit_scores
from hf_plugins.dp.trainer import DPTrainer

# Gradient of a canary over the clipping norm: large, so that missing clipping shows.
_LOUDNESS = 10.0


@dataclass(frozen=True, kw_only=True)
class TrainerAudit:
    """Claim and evidence of one audited run."""

    claimed_epsilon: float
    """What the trainer's ledger says."""
    delta: float
    """Its delta."""
    result: AuditResult
    """What the guesses show."""

    @property
    def refuted(self) -> bool:
        """Whether the evidence contradicts the claim."""
        return self.result.epsilon_lower_bound > self.claimed_epsilon


class _Canaries(nn.Module):
    """One number for each canary, whose gradient no other canary touches."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.table = nn.Embedding(count, 1)
        nn.init.zeros_(self.table.weight)

    def forward(self, canary: Tensor) -> Tensor:
        return self.table(canary[:, None])[:, 0, 0]


def audit_trainer(
    dp: DPConfig,
    *,
    sample_rate: float,
    num_steps: int,
    num_canaries: int = 1000,
    num_guesses: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    trainer_class: type[DPTrainer] = DPTrainer,
) -> TrainerAudit:
    """Train on canaries that a fair coin puts in or leaves out, and bound epsilon from below.

    A canary's loss pulls one number of its own by ten clipping norms, so the run is as telling as any data
    could be, and noise, clipping, sampling rate and divisor of the real trainer all show in it.

    Args:
        dp: Options of privacy under test.
        sample_rate: Probability of a record in a step.
        num_steps: Steps.
        num_canaries: m; more give a tighter bound.
        num_guesses: Guesses, even; default: a third of the canaries.
        confidence: Probability that the bound holds.
        seed: Seed of the coins.
        trainer_class: The trainer under test.

    Returns:
        The claim of the trainer's ledger and the bound.

    Source: Steinke, Nasr, Jagielski 2023 (one training run); Nasr et al. 2023 (canaries in gradient space).
    """
    included = np.random.default_rng(seed).random(num_canaries) < 0.5
    numbers = np.flatnonzero(included)
    batch = max(1, round(sample_rate * len(numbers)))
    model = _Canaries(num_canaries)

    def pull(outputs: Tensor, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        return -_LOUDNESS * dp.max_grad_norm * outputs

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=batch,
            max_steps=num_steps,
            learning_rate=1.0,
            lr_scheduler_type="constant",
            optim="sgd",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = trainer_class(
            model,
            args,
            train_dataset=Dataset.from_dict({"canary": numbers.tolist()}),
            data_collator=default_data_collator,
            compute_loss_func=pull,
            dp=replace(dp, delta=dp.delta if dp.delta is not None else 1 / (10 * num_canaries)),
        )
        trainer.train()
    result = audit_scores(
        model.table.weight.detach().cpu()[:, 0].tolist(),
        included.tolist(),
        delta=trainer.delta,
        num_guesses=num_guesses,
        confidence=confidence,
    )
    return TrainerAudit(claimed_epsilon=trainer.epsilon(), delta=trainer.delta, result=result)


def audit_file(
    path: Path, *, claimed_epsilon: float, delta: float, num_guesses: int | None, confidence: float
) -> TrainerAudit:
    """Audit scores of your own canaries.

    Args:
        path: JSON with ``scores`` (higher: more likely in training) and ``included`` (true or false), one
            entry for each canary.
        claimed_epsilon: Claim under test.
        delta: Its delta.
        num_guesses: As in `audit_trainer`.
        confidence: As in `audit_trainer`.

    Returns:
        Claim and bound.

    Raises:
        ValueError: If the file lacks one of the two lists, or a score is not finite.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    missing = {"scores", "included"} - set(content)
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; it needs two lists of one length.")
    if not all(math.isfinite(score) for score in content["scores"]):
        raise ValueError(f"{path} holds scores that are not finite; score every canary, 0 where you cannot.")
    result = audit_scores(
        content["scores"], content["included"], delta=delta, num_guesses=num_guesses, confidence=confidence
    )
    return TrainerAudit(claimed_epsilon=claimed_epsilon, delta=delta, result=result)
