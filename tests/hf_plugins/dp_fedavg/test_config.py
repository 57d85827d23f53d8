"""Options: ranges, exclusions, recipes."""

import json
from dataclasses import asdict

import pytest

from hf_plugins.dp_fedavg import DPFedAvgConfig, RunConfig
from hf_plugins.dp_fedavg.config import flower_recipe, parse_recipe

RUN = {"task": "images", "data": "x", "output_dir": "y", "num_rounds": 3}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({}, "give either target_epsilon or noise_multiplier"),
        ({"target_epsilon": 1, "noise_multiplier": 1}, "give either target_epsilon or noise_multiplier"),
        ({"target_epsilon": 0}, "target_epsilon must be a finite number > 0"),
        ({"noise_multiplier": -1}, "noise_multiplier must be a finite number >= 0"),
        ({"delta": 1}, "delta must lie in "),
        ({"clipping_norm": 0}, "clipping_norm must be > 0"),
        ({"sample_rate": 0}, "sample_rate must lie in "),
        ({"sample_rate": 10}, "It is a share: 0.1 for 10 % of users"),
        ({"sampling": "fixed"}, "needs cohort_size >= 1, the users of a round"),
        ({"sampling": "shuffle"}, "sampling must be one of poisson, fixed"),
        ({"noise_mode": "shares", "quantile": 0.5}, "no norm reaches the server"),
        ({"missing_shares": "stop"}, "a Poisson cohort is smaller"),
        ({"clipping_norm": float("inf")}, "an infinite clipping_norm bounds nothing"),
        ({"blur": -1}, "0 turns it off"),
        ({"proximal": -1}, "proximal must be a finite number >= 0"),
        ({"keep_ratio": 0}, "It is the share kept: 0.1 for 10 %"),
        ({"server_lr": 0}, "server_lr must be a finite number > 0"),
        ({"quantile": 1}, "quantile must lie in "),
        ({"quantile_lr": 0}, "quantile_lr must be > 0"),
        ({"count_noise_std": 1}, "count_noise_std must be > 0 and needs quantile"),
        ({"lus_score": "x"}, "lus_score must be one of utility, magnitude, random"),
    ],
)
def test_method_options_are_checked(wrong: dict, words: str) -> None:
    base = (
        {} if not wrong or {"target_epsilon", "noise_multiplier"} & set(wrong) else {"noise_multiplier": 1.0}
    )
    with pytest.raises(ValueError, match=words):
        DPFedAvgConfig(**base, **wrong)


def test_all_faults_at_once() -> None:
    with pytest.raises(ValueError, match="DPFedAvgConfig: .*clipping_norm must be .*keep_ratio must lie"):
        DPFedAvgConfig(noise_multiplier=1.0, clipping_norm=-1, keep_ratio=2)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"task": "audio"}, "task must be images, characters or text"),
        ({"num_rounds": 0}, "num_rounds must be >= 1"),
        ({"max_records": -1}, "must be >= 0, 0 for all"),
        ({"alpha": 0}, "alpha must be > 0"),
        ({"task": "text", "group_size": 2}, "group_size > 1 works with task='images' only"),
    ],
)
def test_run_options_are_checked(wrong: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RunConfig(**{**RUN, **wrong})


def test_derived_values() -> None:
    config = DPFedAvgConfig(noise_multiplier=1.0)
    assert config.delta_for(500) == pytest.approx(500**-1.1)
    assert config.delta_for(500) < 1 / 500
    assert config.expected_users(500) == pytest.approx(50)
    fixed = DPFedAvgConfig(noise_multiplier=1.0, sampling="fixed", cohort_size=7, delta=1e-3)
    assert fixed.expected_users(500) == 7
    assert fixed.delta_for(10) == 1e-3
    assert DPFedAvgConfig(**json.loads(json.dumps(asdict(config)))) == config


def test_recipe() -> None:
    run, dp, local = parse_recipe({**RUN, "dp": {"noise_multiplier": 1.0}, "local": {"learning_rate": 0.1}})
    assert (run.num_rounds, dp.noise_multiplier, local) == (3, 1.0, {"learning_rate": 0.1})
    with pytest.raises(ValueError, match=" has the unknown key .*; did you mean 'num_rounds'"):
        parse_recipe({**RUN, "num_round": 3})
    with pytest.raises(ValueError, match=" has the unknown key .*; known: "):
        parse_recipe({**RUN, "dp": {"zzz": 3}})
    with pytest.raises(ValueError, match="lacks task, data.*; every recipe must say so"):
        parse_recipe({"output_dir": "y", "num_rounds": 3})
    with pytest.raises(ValueError, match=" must hold keys and values; got "):
        parse_recipe({**RUN, "dp": 3})


def test_recipe_of_a_flower_run() -> None:
    flat = {
        "task": "images",
        "data": "x",
        "output-dir": "y",
        "num-rounds": 3,
        "report-to": "tensorboard,wandb",
        "dp.noise-multiplier": 1.0,
        "local.learning-rate": 0.1,
        "rounds.num-nodes": 2,
    }
    run, dp, local = flower_recipe(flat, {"data": "here", "partition-id": 0})
    assert (run.data, run.report_to, dp.noise_multiplier, local) == (
        "here",
        ["tensorboard", "wandb"],
        1.0,
        {"learning_rate": 0.1},
    )
    assert flower_recipe({**flat, "report-to": ""})[0].report_to == []


def test_public_names_come_when_asked_for() -> None:
    import hf_plugins.dp_fedavg as room

    assert room.BLURCallback.__name__ == "BLURCallback"
    with pytest.raises(AttributeError, match="has no attribute "):
        room.Nothing  # noqa: B018
