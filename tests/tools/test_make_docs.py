"""Generated parts of the docs: filled from their sources, stale ones found."""

import dataclasses
import json
from pathlib import Path

import pytest

from tools import make_docs

RECORD = {
    "name": "toy",
    "command": "python benchmarks/toy.py",
    "config": {},
    "versions": {"torch": "2.13.0"},
    "seeds": [0, 1],
    "hardware": "2 cores",
    "table": {"columns": ["what", "ratio"], "rows": [["a|b", 1.23456], ["c", "x"]]},
    "notes": ["A note."],
}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results" / "toy.json").write_text(json.dumps(RECORD))
    (tmp_path / "README.md").write_text("Before\n<!-- results:toy -->\nold\n<!-- /generated -->\nAfter\n")
    return tmp_path


def test_table_with_its_provenance(repository: Path) -> None:
    assert make_docs.stale_files(repository) == ["README.md"]
    text = make_docs.render((repository / "README.md").read_text(), module="", root=repository)
    assert "| a\\|b | 1.235 |" in text
    assert "Repeat: `python benchmarks/toy.py` (seeds 0, 1)." in text
    assert text.startswith("Before\n")
    assert text.endswith("<!-- /generated -->\nAfter\n")
    (repository / "README.md").write_text(text)
    assert make_docs.stale_files(repository) == []


def test_table_without_measurement_is_refused(repository: Path) -> None:
    (repository / "docs/results/toy.json").unlink()
    with pytest.raises(FileNotFoundError, match="run the benchmark that writes it"):
        make_docs.stale_files(repository)


@dataclasses.dataclass
class _HostConfig:
    """Stands for a config of transformers: a dataclass whose constructor is written by hand.

    Args:
        width: Units of a layer.
    """

    model_type = "toy"
    of_the_host: int = 1

    def __init__(self, width: int = 8) -> None:
        self.width = width


def test_a_config_of_transformers_shows_its_own_options() -> None:
    table = make_docs.options_part(f"{__name__}._HostConfig")
    assert "| `width` | `8` | Units of a layer. |" in table
    assert "of_the_host" not in table


def test_options_of_a_dataclass_and_of_a_constructor() -> None:
    assert "| `seeds` | `False` |" not in make_docs.options_part("tools.training_runs.Training")
    table = make_docs.options_part("mm_plugins.pkd.loss.PKDLoss")
    assert "| `loss_weight` | `1.0` | Factor of the loss, >= 0. |" in table


CLAIMS = """
[[method]]
name = "Toy"
room = "mm_plugins/toy"
gives = "a toy"
paper = "37 (Table 1)"
[[method.figure]]
what = "a set"
file = "toy"
ours = ["c", "ratio", "{} times"]
peer = ["a|b", "ratio"]
[[method]]
name = "Later"
room = "hf_plugins/later"
gives = "nothing yet"
paper = ""
"""


def test_overview_takes_its_figures_from_the_result_files(repository: Path) -> None:
    (repository / "docs" / "claims.toml").write_text(CLAIMS)
    (repository / "docs" / "results.md").write_text("<!-- overview:figures -->\n<!-- /generated -->\n")
    (repository / "README.md").write_text("<!-- overview:methods -->\n<!-- /generated -->\n")
    readme = make_docs._rendered(repository / "README.md", repository)[1]
    assert "| a toy | a set: **x times**; a\\|b: 1.235 ([all](mm_plugins/toy/README.md#results)) |" in readme
    assert "nothing yet | not measured yet" in readme
    page = make_docs._rendered(repository / "docs" / "results.md", repository)[1]
    assert "| Toy | 37 (Table 1) | a set | x times | a\\|b: 1.235 | 2 seeds, 2 cores" in page


@pytest.mark.parametrize(("old", "new"), [('"c"', '"d"'), ('"ratio", "{} times"', '"speed", "{} times"')])
def test_overview_of_a_figure_that_is_gone_is_refused(repository: Path, old: str, new: str) -> None:
    (repository / "docs" / "claims.toml").write_text(CLAIMS.replace(old, new))
    with pytest.raises(ValueError, match=r"rows of toy.json begin with .* Correct the entry"):
        make_docs.overview_part("figures", repository, repository / "README.md")
    (repository / "docs/results/toy.json").unlink()
    with pytest.raises(FileNotFoundError, match="asks for toy.json; run the benchmark"):
        make_docs.overview_part("figures", repository, repository / "README.md")
    with pytest.raises(ValueError, match="methods or figures; got 'all'. Correct the marker"):
        make_docs.overview_part("all", repository, repository / "README.md")
