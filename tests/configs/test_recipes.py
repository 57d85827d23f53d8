"""Every recipe in configs/ is understood: each key is an option, each value passes its check."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "configs").glob("*/*.yaml"))


def _host_arguments(values: dict[str, Any], *classes: type) -> None:
    """The recipe's own dataclasses and the host's arguments; bf16 is allowed on a machine without a GPU."""
    from transformers import HfArgumentParser, TrainingArguments

    HfArgumentParser((*classes, TrainingArguments)).parse_dict({"use_cpu": True, **values})


def _dp(values: dict[str, Any]) -> None:
    from hf_plugins.dp.config import DPConfig, RunConfig

    DPConfig(**values.pop("dp"))
    _host_arguments(values, RunConfig)


def _autodp(values: dict[str, Any]) -> None:
    from hf_plugins.autodp.config import AutoDPConfig

    AutoDPConfig(**values)


def _dpf_cm(values: dict[str, Any]) -> None:
    from hf_plugins.dpf_cm.config import PPVDConfig, RecipeConfig

    PPVDConfig(**RecipeConfig(**values).ppvd)


def _hpn(values: dict[str, Any]) -> None:
    from hf_plugins.hpn.config import read_recipe

    read_recipe(values)


def _dpnas(values: dict[str, Any]) -> None:
    from hf_plugins.dp.config import DPConfig
    from hf_plugins.dpnas.config import DPNASTrainConfig

    DPConfig(**values.pop("dp"))
    _host_arguments(values, DPNASTrainConfig)


def _dp_fedavg(values: dict[str, Any]) -> None:
    from hf_plugins.dp_fedavg.config import parse_recipe

    parse_recipe(values)


def _embed_parrot(values: dict[str, Any]) -> None:
    from hf_plugins.embed_parrot.config import LeakScanConfig

    LeakScanConfig(**values)


def _fapm(values: dict[str, Any]) -> None:
    from hf_plugins.fapm.config import FAPMConfig

    assert {values.pop(name) for name in ("base", "finetuned", "out")}
    FAPMConfig(**values)


def _gradpruner(values: dict[str, Any]) -> None:
    from transformers import HfArgumentParser
    from trl import SFTConfig

    from hf_plugins.gradpruner.config import GradPrunerConfig, RunConfig

    parser = HfArgumentParser((RunConfig, GradPrunerConfig, SFTConfig))
    parser.parse_dict({"use_cpu": True, **values})


def _tee_split(values: dict[str, Any]) -> None:
    from transformers import HfArgumentParser

    from hf_plugins.tee_split.config import ClientConfig, SPFConfig, TailConfig

    if "store" in values:
        _host_arguments(values, TailConfig, SPFConfig)
    else:
        HfArgumentParser((ClientConfig,)).parse_dict(values)


READERS: dict[str, Callable[[dict[str, Any]], None]] = {
    "autodp": _autodp,
    "dp": _dp,
    "dp_fedavg": _dp_fedavg,
    "dpf_cm": _dpf_cm,
    "dpnas": _dpnas,
    "embed_parrot": _embed_parrot,
    "fapm": _fapm,
    "gradpruner": _gradpruner,
    "hpn": _hpn,
    "tee_split": _tee_split,
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: "/".join(path.parts[-2:]))
def test_recipe_is_understood(path: Path) -> None:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    READERS[path.parent.name](values)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: "/".join(path.parts[-2:]))
def test_a_misspelt_key_is_refused(path: Path) -> None:
    """The test above can fail: one letter too many in any recipe is an error."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    with pytest.raises((ValueError, TypeError), match="misspelt_key"):
        READERS[path.parent.name](values | {"misspelt_key": 1})
