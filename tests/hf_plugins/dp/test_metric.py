"""The audit: a correct trainer stands, broken ones are caught, in one short run each."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_plugins.dp import mechanism
from hf_plugins.dp import model as engine
from hf_plugins.dp.config import DPConfig
from hf_plugins.dp.metric import audit_file, audit_trainer
from hf_plugins.dp.trainer import DPTrainer

pytestmark = pytest.mark.host

CLAIM = {"noise_multiplier": 4.0, "seed": 1, "delta": 1e-5}


def _audit(trainer_class: type[DPTrainer] = DPTrainer, **options: Any) -> Any:
    chosen = {"sample_rate": 1.0, "num_steps": 2, "num_canaries": 600, **options}
    return audit_trainer(DPConfig(**CLAIM), trainer_class=trainer_class, **chosen)


def test_correct_trainer_is_not_refuted_and_the_bound_is_not_idle() -> None:
    """mu = sqrt(16) / 4 = 1, epsilon 4.38: 600 canaries show some of it and never more than there is."""
    done = _audit(num_steps=16)
    assert done.claimed_epsilon == pytest.approx(4.377178, abs=1e-4)
    assert not done.refuted
    assert 0.3 < done.result.epsilon_lower_bound < done.claimed_epsilon


def test_poisson_sampling_is_not_refuted() -> None:
    done = _audit(sample_rate=0.25, num_steps=8)
    assert not done.refuted
    assert done.claimed_epsilon < 3


def test_trainer_without_noise_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechanism.NoisySum, "add_noise", lambda self, gaussian: None)
    done = _audit()
    assert done.claimed_epsilon < 2
    assert done.refuted


def test_trainer_without_clipping_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def unclipped(norms: Tensor, bound: float) -> Tensor:
        return torch.ones_like(norms)

    monkeypatch.setattr(engine, "clip_factors", unclipped)
    assert _audit().refuted


def test_trainer_that_divides_its_noise_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise of a mean added to a sum: a classic slip that leaves all code paths looking right."""
    plain = mechanism.NoisySum.__init__

    def slip(self: Any, *args: Any, expected_units: float, noise_multiplier: float, **kwargs: Any) -> None:
        plain(
            self,
            *args,
            expected_units=expected_units,
            noise_multiplier=noise_multiplier / expected_units,
            **kwargs,
        )

    monkeypatch.setattr(mechanism.NoisySum, "__init__", slip)
    assert _audit().refuted


def test_scores_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"scores": list(range(300)), "included": [i >= 150 for i in range(300)]}))
    options = {"delta": 1e-6, "num_guesses": None, "confidence": 0.95}
    assert audit_file(path, claimed_epsilon=1.0, **options).refuted
    assert not audit_file(path, claimed_epsilon=9.0, **options).refuted
    path.write_text(json.dumps({"scores": [1.0]}))
    with pytest.raises(ValueError, match="lacks included; it needs two lists of one length"):
        audit_file(path, claimed_epsilon=1.0, **options)
    path.write_text(json.dumps({"scores": [float("nan"), 1.0], "included": [True, False]}))
    with pytest.raises(ValueError, match="holds scores that are not finite; score every canary"):
        audit_file(path, claimed_epsilon=1.0, **options)
