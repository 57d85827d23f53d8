"""Options: what is refused, all at once."""

import json
from dataclasses import asdict

import pytest

from hf_plugins.fapm import FAPMConfig
from hf_plugins.fapm.config import METHODS
from hf_plugins.fapm.score import METHODS as CORE_METHODS


def test_defaults_are_the_papers() -> None:
    config = FAPMConfig()
    assert (config.keep, config.method, config.coefficient, config.scope) == (0.1, "fapm", 1.0, "tensor")
    assert (config.include, config.exclude, config.out_dtype) == (None, None, None)
    assert METHODS == CORE_METHODS
    assert json.loads(json.dumps(asdict(config))) == asdict(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 20}, "keep must lie in"),
        ({"per_tensor": {"mlp": -1}}, r"per_tensor\['mlp'\] must lie in"),
        ({"method": "wanda"}, "method must be one of"),
        ({"scope": "layer"}, "scope must be 'tensor' or 'global'"),
        ({"out_dtype": "int8"}, "out_dtype must be one of"),
        ({"method": "ties", "per_tensor": {"a": 0.1}}, "per_tensor has no meaning with a global keep"),
        ({"method": "dare", "sidecar": True}, "sidecar needs a method that keeps fine-tuned values"),
        ({"chunk": 0}, "chunk must be >= 1"),
        ({"resident_mib": -1}, "resident_mib must be >= 0"),
        ({"include": "["}, "include is no regular expression"),
    ],
)
def test_wrong_values(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match="FAPMConfig: .*" + message):
        FAPMConfig(**options)


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ValueError, match="keep must lie in .* chunk must be"):
        FAPMConfig(keep=2, chunk=0)


def test_ties_counts_over_all_tensors() -> None:
    assert FAPMConfig(method="ties").is_global
    assert FAPMConfig(scope="global").is_global
    assert not FAPMConfig().is_global
