import json
from dataclasses import asdict

import pytest

from hf_plugins.autodp.config import AutoDPConfig


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sample_ratio": 20}, r"It is a share: 0.2 is a fifth"),
        ({"search": "grid"}, "search must be one of agent, exhaustive"),
        ({"num_steps": 0}, "num_steps must be >= 1; got 0"),
        ({"lora_r": -1}, "lora_r must be >= 0"),
        ({"level": 95}, r"Write 0.95 for 95 %"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0"),
        ({"min_tokens": 30, "max_tokens": 20}, "max_tokens must be >= min_tokens"),
        ({"remote_data": "yes"}, "must be empty or 'rows may leave this machine'"),
        ({"metric": "winrate"}, "metric='loss' needs no judge"),
        ({"screening": "teacher"}, "screening='off' rewrites all rows"),
        ({"workers": 2, "isolate": False}, "one process trains one model"),
    ],
)
def test_wrong_options(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoDPConfig(**{"metric": "loss"} | given)


def test_all_faults_at_once() -> None:
    with pytest.raises(ValueError, match="AutoDPConfig: .*num_dev.*num_test"):
        AutoDPConfig(metric="loss", num_dev=0, num_test=0)


def test_a_name_that_is_not_there() -> None:
    import hf_plugins.autodp

    with pytest.raises(AttributeError, match=" has no attribute .*AutoDp"):
        _ = hf_plugins.autodp.AutoDp


def test_round_trip() -> None:
    config = AutoDPConfig(metric="loss", agent={"kind": "heuristic"})
    assert AutoDPConfig(**json.loads(json.dumps(asdict(config)))) == config
