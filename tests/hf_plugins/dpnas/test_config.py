"""Wrong options are named all at once, with what was given."""

import pytest

from hf_plugins.dpnas.config import SHAPES, DPNASSearchConfig, DPNASTrainConfig


def test_defaults_are_the_released_search() -> None:
    config = DPNASSearchConfig()
    assert (config.num_steps, config.warmup_steps, config.sample_rate, config.noise_multiplier) == (
        12000,
        2000,
        0.01,
        0.8,
    )
    assert (config.learning_rate, config.final_learning_rate, config.momentum) == (0.02, 0.001, 0.9)
    assert SHAPES["cifar10"]["cell_channels"] == (48, 96, 192)
    assert SHAPES["mnist"] == SHAPES["fashion_mnist"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "imagenet"}, "shape must be one of cifar10, mnist, fashion_mnist; got 'imagenet'"),
        ({"strategy": "mcts"}, "strategy must be one of controller, random; got 'mcts'"),
        ({"num_steps": 0}, "num_steps must be >= 1; got 0"),
        ({"num_steps": 5, "warmup_steps": 6}, r"warmup_steps must lie in 0..num_steps \(5\); got 6"),
        ({"sample_rate": 300}, r"sample_rate must lie in \(0, 1\]; got 300. It is a share"),
        ({"reward_split": 1.0}, r"reward_split must lie in \(0, 1\); got 1.0"),
        ({"max_grad_norm": 0}, "max_grad_norm must be a finite number > 0; got 0"),
        ({"noise_multiplier": -1}, "noise_multiplier must be a finite number >= 0; got -1"),
    ],
)
def test_wrong_values_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPNASSearchConfig(**options)


def test_all_wrong_fields_are_reported_together() -> None:
    with pytest.raises(
        ValueError, match="DPNASSearchConfig: .*groups must be >= 1; got 0.*delta must lie in"
    ):
        DPNASSearchConfig(groups=0, delta=1)


def test_what_is_trained_is_checked_too() -> None:
    with pytest.raises(
        ValueError, match="DPNASTrainConfig: .*preset must be one of .*limit must be >= 1; got 0"
    ):
        DPNASTrainConfig(data="x", preset="svhn", limit=0, momentum=1.0)
    assert DPNASTrainConfig(data="x").momentum == 0.9
