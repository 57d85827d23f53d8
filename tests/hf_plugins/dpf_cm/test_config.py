import dataclasses
from typing import Any

import pytest

from hf_plugins.dpf_cm.config import PPVDConfig, RecipeConfig


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"rouge_threshold": 85}, r"rouge_threshold must lie in \[0, 1\]; got 85. It is a share: write 0.85"),
        ({"max_fpr": 1.0}, r"max_fpr must lie in \[0, 1\); got 1.0"),
        ({"key_points": ()}, "key_points must be shares in"),
        ({"suffix_points": (1.0,)}, "suffix_points must be shares between 0 and 1"),
        ({"output_guard": "warn"}, "output_guard must be block, replace or off"),
        ({"store": "redis"}, "store must be lancedb, numpy or qdrant"),
        ({"protect": "hash"}, "protect must be none, sketch or encrypt"),
        ({"ngram": 1}, "ngram must be >= 2; got 1"),
        ({"batch_size": 0}, "batch_size must be >= 1; got 0"),
        ({"num_directions": -1}, "num_directions must be >= 0; got -1"),
    ],
)
def test_ppvd_options(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PPVDConfig(**wrong)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"lang": "fr"}, "lang must be zh or en"),
        ({"num_prompts": 0}, "num_prompts must be >= 1"),
        ({"num_reward_models": 1}, "cross_fit needs num_reward_models >= 2"),
        ({"trim": (10, 10)}, "trim must be two shares that sum to at most 1"),
        ({"trim": (0.1,)}, "trim must be two shares"),
        ({"denoise_action": "fix"}, "denoise_action must be drop, flip or label_smooth"),
    ],
)
def test_recipe_options(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        RecipeConfig(**wrong)


def test_all_faults_at_once_and_plain_values() -> None:
    with pytest.raises(ValueError, match=r"PPVDConfig: .*ngram must be .* \| .*batch_size must be"):
        PPVDConfig(ngram=0, batch_size=0)
    assert PPVDConfig(**dataclasses.asdict(PPVDConfig())) == PPVDConfig()
    assert PPVDConfig(key_points=[0.0, 0.5]).key_points == (0.0, 0.5)
    with pytest.raises(ValueError, match="RecipeConfig: .*lang must be zh or en"):
        RecipeConfig(lang="fr")
    assert RecipeConfig().clients is not RecipeConfig().clients
    assert RecipeConfig(num_reward_models=1, cross_fit=False).trim == (0.1, 0.1)
