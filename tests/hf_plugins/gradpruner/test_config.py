"""Options and their checks."""

import pytest

from hf_plugins.gradpruner.config import GradPrunerConfig, RunConfig


def test_paper_is_the_default() -> None:
    config = GradPrunerConfig()
    assert (config.num_steps, config.keep, config.estimator, config.score) == (40, 0.2, "product", "squared")
    assert (config.normalize, config.weighting, config.protect) == ("none", "none", [0, -1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be a whole number >= 1 or a share"),
        ({"num_steps": 1.5}, "num_steps must be a whole number >= 1 or a share"),
        ({"n_prune": -1}, "n_prune must be >= 0"),
        ({"ratio": 40}, "write 0.4 for 40 %"),
        ({"ratio": 0.4, "n_prune": 2}, "exclude each other; give one"),
        ({"layers": [1], "n_prune": 2}, "exclude each other; give one"),
        ({"keep": 20}, "write 0.2 for 20 %"),
        ({"n_merge": "some"}, "n_merge must be a number >= 0, 'all' or None"),
        ({"n_merge": "-2"}, "n_merge must be a number >= 0, 'all' or None"),
        ({"estimator": "taylor"}, "estimator must be one of product, first_order, exact"),
        ({"score": "l1"}, "score must be one of squared, fro"),
        ({"normalize": "layers"}, "normalize must be one of none, params"),
        ({"history": "gpu"}, "history must be one of memory, disk, scores"),
        ({"method": "magnitud"}, "method must be one of gradpruner, reverse, random"),
        ({"weighting": "mean"}, "weighting must be one of none, importance"),
    ],
)
def test_wrong_values(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match="GradPrunerConfig: .*" + message):
        GradPrunerConfig(**options)


def test_all_wrong_fields_are_told_at_once() -> None:
    with pytest.raises(ValueError, match="keep must lie in .* estimator must be one of"):
        GradPrunerConfig(keep=2.0, estimator="x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"finetune": "some"}, "finetune must be full, lora or none"),
        ({"prompt_column": "q", "label_column": "y"}, "prompt_column and label_column exclude each other"),
        ({"lora_r": 0}, "lora_r must be >= 1"),
        ({"lora_alpha": 0}, "lora_alpha must be >= 1"),
        ({"calibration_rows": 0}, "calibration_rows must be >= 1"),
        ({"lora_dropout": 1.0}, r"lora_dropout must lie in \[0, 1\)"),
        ({"score_learning_rate": 0.0}, "score_learning_rate must be > 0"),
    ],
)
def test_wrong_run_values(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match="RunConfig: .*" + message):
        RunConfig(model="m", **options)
