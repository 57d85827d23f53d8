"""Recipes and weights from users: every way to be wrong has its sentence."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_plugins.recipes import check_weights, read_recipe


def test_a_mapping_comes_back_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("keep: 0.1\nlayers: [1, 2]\nname: \u4e2d\u6587\n", encoding="utf-8")
    assert read_recipe(path) == {"keep": 0.1, "layers": [1, 2], "name": "\u4e2d\u6587"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"- 1\n", "holds list. The folder configs/ has examples"),
        (b"", "holds NoneType. The folder configs/ has examples"),
        (b"a: 1\nb: [1, 2\nc: }\n", "line 3, column 2: .* A recipe has plain"),
        (b"\ta: 1\n", "line 1, column 1: .* A recipe has plain"),
        (b"a: !!python/object/apply:os.system ['true']\n", "line 1, column 4: .* A recipe has plain"),
        ("a: \xe9".encode("latin-1"), "no UTF-8 text .byte 3.. Save it as UTF-8"),
    ],
)
def test_what_is_no_recipe_is_told_with_its_place(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_recipe(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="configs/ holds some to start from"):
        read_recipe(tmp_path / "r.yaml")
    with pytest.raises(ValueError, match="is a folder; a recipe is one YAML file in it"):
        read_recipe(tmp_path)


def test_weights_that_are_cut_off_or_a_pickle_are_refused(tmp_path: Path) -> None:
    check_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"as a pickle .pytorch_model.bin., .* save it again"):
        check_weights(tmp_path)
    weights = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, weights)
    check_weights(tmp_path)
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ValueError, match="is cut off or no safetensors file .* Copy it again"):
        check_weights(tmp_path)
