"""Reading and writing the safetensors layout as streams."""

import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

from hf_plugins.gradpruner.shards import (
    Entry,
    FileMatrix,
    copy_chunks,
    read_checkpoint,
    read_entries,
    tensor_chunks,
    write_header,
)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {
        "a": torch.randn(5, 3),
        "b.bias": torch.randn(4).bfloat16(),
        "c": torch.randn(2, 3, 4).half(),
        "empty": torch.zeros(0, 3),
    }


@pytest.fixture
def file(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def test_a_copied_file_is_read_by_the_library(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    entries = read_entries(file)
    out = io.BytesIO()
    write_header(out, {f"new.{name}": entry for name, entry in entries.items()})
    assert out.tell() % 8 == 0
    for entry in entries.values():
        for chunk in copy_chunks(entry):
            out.write(chunk)
    got = load(out.getvalue())
    assert got.keys() == {f"new.{name}" for name in tensors}
    assert all(torch.equal(got[f"new.{name}"], value) for name, value in tensors.items())


def test_rows_are_read_from_the_file(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    entries = read_entries(file)
    assert torch.equal(FileMatrix(entries["a"])[1:4], tensors["a"][1:4])
    assert torch.equal(FileMatrix(entries["b.bias"])[:], tensors["b.bias"])
    assert torch.equal(FileMatrix(entries["c"])[1:], tensors["c"][1:])


def test_tensor_bytes(tensors: dict[str, torch.Tensor]) -> None:
    raw = b"".join(tensor_chunks(tensors["b.bias"]))
    assert torch.equal(torch.frombuffer(bytearray(raw), dtype=torch.bfloat16), tensors["b.bias"])


@pytest.mark.parametrize("cut", [4, 30, 200])
def test_truncated_files_are_told(file: Path, cut: int) -> None:
    """Inside the length, the header and the data."""
    whole = file.read_bytes()
    file.write_bytes(whole[:-7] if cut == 200 else whole[:cut])
    with pytest.raises(ValueError, match="is cut short: .* bytes|is no whole safetensors file: its header"):
        read_entries(file)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    entry = Entry(tmp_path / "x.safetensors", "I8", (2, 2), 0, 4)
    with pytest.raises(TypeError, match="quantised weights cannot be merged. Run on the original"):
        FileMatrix(entry)


def test_index_and_files_must_agree(file: Path, tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    assert read_checkpoint(tmp_path) == {"model.safetensors": list(read_entries(file))}
    shard = tmp_path / "model-00001-of-00002.safetensors"
    save_file(tensors, shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard.name)}))
    assert set(read_checkpoint(tmp_path)[shard.name]) == set(tensors)
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*tensors, "more"], shard.name)}))
    with pytest.raises(ValueError, match=" disagree on tensors .*more"):
        read_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"x": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="Fetch the missing shard"):
        read_checkpoint(tmp_path)


def test_weights_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="pickled .bin weights are not read"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../out.safetensors", "/etc/out.safetensors", "a/b.safetensors"])
def test_an_index_cannot_name_a_file_elsewhere(tmp_path: Path, name: str) -> None:
    """Output files are called as the index calls them: such a name would be written to."""
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(ValueError, match="is not a file of that folder. Do not trust this checkpoint"):
        read_checkpoint(tmp_path)
