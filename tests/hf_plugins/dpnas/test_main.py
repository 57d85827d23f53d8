"""The commands on real files: a short search, training of its cell, and one line for wrong input."""

import json
from pathlib import Path

import numpy as np
import pytest

from hf_plugins.dpnas.__main__ import main
from tests.hf_plugins.dpnas.test_dataset import write_idx

pytestmark = pytest.mark.host


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (30, 28, 28), dtype=np.uint8)
    write_idx(folder, pixels, np.arange(30, dtype=np.uint8) % 10)
    return folder


def test_search_then_train_its_cell(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "search"
    short = "--shape mnist --num_steps 2 --warmup_steps 1 --sample_rate .2 --num_candidates 2 --delta .01"
    assert main(["search", str(images), str(out), *short.split()]) == 0
    printed = capsys.readouterr().out
    assert "cell: n1:" in printed
    assert "epsilon" in printed
    cell = json.loads((out / "search.json").read_text())["genotype"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"data: {images}\ncell_file: {out / 'search.json'}\neval_split: null\n"
        f"output_dir: {tmp_path / 'model'}\nmax_steps: 1\nper_device_train_batch_size: 4\n"
        "save_strategy: 'no'\nuse_cpu: true\nreport_to: none\n"
        "dp:\n  noise_multiplier: 1.0\n  max_grad_norm: 0.1\n"
    )
    assert main(["train", str(recipe)]) == 0
    assert json.loads((tmp_path / "model" / "config.json").read_text())["genotype"] == cell


def test_wrong_input_is_one_line_and_code_two(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["search", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "holds no images of split 'train'" in capsys.readouterr().err
    assert main(["search", str(tmp_path), str(tmp_path / "out"), "--sample_rate", "7"]) == 2
    assert "sample_rate must lie in (0, 1]; got 7.0" in capsys.readouterr().err
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: x\n")
    assert main(["train", str(recipe)]) == 2
    assert "needs a section dp: that holds the options of DPConfig" in capsys.readouterr().err
    recipe.write_text("data: x\noutput_dir: y\ndp:\n  sigma: 1.0\n")
    assert main(["train", str(recipe)]) == 2
    assert "section dp: " in capsys.readouterr().err
