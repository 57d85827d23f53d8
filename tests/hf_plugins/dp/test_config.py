"""Options: defaults, and every refusal with its cure."""

import pytest

from hf_plugins.dp.config import DPConfig, RunConfig

GOOD = {"target_epsilon": 3.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_epsilon": None}, "give either target_epsilon or noise_multiplier; got target_epsilon=None"),
        ({"noise_multiplier": 1.0}, "give either target_epsilon or noise_multiplier; got target_epsilon=3.0"),
        ({"target_epsilon": 0.0}, "For training without privacy write noise_multiplier=0"),
        ({"target_epsilon": None, "noise_multiplier": -1.0}, "noise_multiplier must be a finite number >= 0"),
        ({"delta": 1.0}, "delta must lie in .0, 1.; got 1.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be a finite number > 0; got 0.0"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm must be a finite number > 0; got inf"),
        ({"grad_sample_mode": "ew"}, "grad_sample_mode must be one of auto, ghost, hooks; got 'ew'"),
        ({"unit": "group"}, "unit must be one of record, user; got 'group'"),
        ({"unit": "user"}, "unit='user' needs user_column"),
        ({"user_column": "who"}, "user_column and max_records_per_user act with unit='user' only"),
        ({"max_records_per_user": 2}, "a user of several records is protected less than epsilon says"),
        ({"max_records_per_user": 0}, "max_records_per_user must be >= 1; got 0"),
        ({"secure": True, "seed": 1}, "a run that can be repeated is not secure"),
    ],
)
def test_wrong_values_say_what_is_needed(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPConfig(**{**GOOD, **options})


def test_all_wrong_fields_come_at_once() -> None:
    with pytest.raises(ValueError, match=r"DPConfig: delta must lie .* \| max_grad_norm must be"):
        DPConfig(target_epsilon=1.0, delta=2.0, max_grad_norm=-1.0)


def test_infinite_epsilon_is_asked_for_by_name() -> None:
    assert DPConfig(noise_multiplier=0.0).target_epsilon is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "max_length must be >= 2; got 1"),
        ({"lora_rank": -1}, "lora_rank must be >= 0; got -1"),
    ],
)
def test_recipe_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig(model="m", train_file="t", **options)
