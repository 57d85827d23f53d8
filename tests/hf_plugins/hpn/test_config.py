"""Options: all wrong ones are named at once."""

import math
from typing import Any

import pytest

from hf_plugins.hpn.config import HPNConfig, TaskConfig


def test_defaults_are_valid_and_the_papers_where_it_has_them() -> None:
    config = HPNConfig()
    assert (config.num_rounds, config.num_steps, config.bandwidth, config.num_features) == (
        400,
        4000,
        127.0,
        6,
    )
    assert config.encoding_noise_multiplier == 0.1
    assert TaskConfig().task == "synthetic"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "bohb"}, "method must be one of hpn, released, uniform, fedex, random, tpe, default"),
        ({"policy": "gauss"}, "policy must be one of categorical, beta; got .*'gauss'"),
        ({"reward": "sum"}, "reward must be one of client, global"),
        ({"judged": "x"}, "judged must be one of local, aggregate"),
        ({"reference": "x"}, "reference must be one of paired, anchor"),
        ({"baseline": "x"}, "baseline must be one of ema, none"),
        ({"encoder": "pca"}, "encoder must be one of rff, rff-median, frozen-features, histogram"),
        ({"store": "x"}, "store must be one of all, every_n, diff"),
        ({"store_dtype": "int8"}, "store_dtype must be one of float32, float16, bfloat16"),
        ({"num_rounds": 0}, "num_rounds must be >= 1; got .*0"),
        ({"learning_rate": math.inf}, "learning_rate must be a finite number > 0; got .*inf"),
        ({"reward_noise_multiplier": -1.0}, "reward_noise_multiplier must be a finite number >= 0; got .*-1"),
        ({"encoding_epsilon": 0.0}, "encoding_epsilon must be > 0 or None; got .*0"),
        ({"delta": 1.0}, r"delta must lie in \(0, 1\); got .*1"),
        ({"num_features": 3}, "num_features must be even and >= 2 with rff; got .*3"),
        ({"num_features": 0, "encoder": "frozen-features"}, "num_features must be >= 1; got .*0"),
        (
            {"method": "fedex", "policy": "beta"},
            "method='fedex' searches a grid; it needs policy='categorical'",
        ),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"HPNConfig: .*{message}"):
        HPNConfig(**options)


def test_all_wrong_options_are_told_together() -> None:
    with pytest.raises(ValueError, match=r"num_rounds.* \| num_steps.* \| delta"):
        HPNConfig(num_rounds=0, num_steps=0, delta=2.0)
