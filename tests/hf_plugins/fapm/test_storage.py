"""Reading and writing safetensors by hand: against the library, cut files, full disks."""

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_plugins.fapm.storage import (
    INDEX,
    SINGLE,
    Checkpoint,
    Planned,
    ShardWriter,
    StoredPair,
    read_shard,
    shard_paths,
    side_files,
    write_config,
)
from tests.hf_plugins.fapm.tiny import weights, write_model

ALL_DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int8,
    torch.bool,
]


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    tensors = {str(dtype): (torch.arange(12).view(3, 4) % 2).to(dtype) for dtype in ALL_DTYPES}
    with Checkpoint(write_model(tmp_path, tensors)) as checkpoint:
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint.tensor(name), tensor)
        entry = checkpoint.entries["torch.float32"]
        part = checkpoint.read_into(entry, 5, torch.empty(3))
        assert torch.equal(part, tensors["torch.float32"].flatten()[5:8])


def test_writes_what_the_library_reads(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    writer.plan(SINGLE, [Planned("a", "BF16", (2, 3)), Planned("b", "F32", (5,))])
    writer.create()
    a, b = torch.arange(6.0).bfloat16(), torch.arange(5.0)
    writer.write("b", 2, b[2:])
    writer.write("a", 0, a)
    writer.write("b", 0, b[:2])
    writer.close(sync=True)
    found = load_file(tmp_path / SINGLE)
    assert torch.equal(found["a"], a.view(2, 3))
    assert torch.equal(found["b"], b)


def test_header_of_the_base_is_taken_over(tmp_path: Path) -> None:
    shard = read_shard(write_model(tmp_path / "base", weights()[0]) / SINGLE)
    (tmp_path / "out").mkdir()
    writer = ShardWriter(tmp_path / "out")
    planned = [Planned(entry.name, entry.dtype, entry.shape) for entry in shard.entries]
    writer.plan(SINGLE, planned, like=shard)
    writer.create()
    assert read_shard(tmp_path / "out" / SINGLE) == shard
    assert shard.metadata == {"format": "pt"}


def test_several_shards_and_their_index(tmp_path: Path) -> None:
    tensors = weights()[0]
    with Checkpoint(write_model(tmp_path, tensors, shards=3)) as checkpoint:
        assert set(checkpoint.entries) == set(tensors)
        assert len(checkpoint.shards) == 3
    (tmp_path / "out").mkdir()
    writer = ShardWriter(tmp_path / "out")
    for shard in checkpoint.shards:
        writer.plan(shard.name, [Planned(e.name, e.dtype, e.shape) for e in shard.entries], like=shard)
    writer.write_index()
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"] == json.loads((tmp_path / INDEX).read_text())["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize("resident", [0, 1 << 20])
def test_pair_reads_ranges_of_both(tmp_path: Path, resident: int) -> None:
    before, after = weights()
    with (
        Checkpoint(write_model(tmp_path / "a", before)) as a,
        Checkpoint(write_model(tmp_path / "b", after)) as b,
    ):
        name = "layers.0.mlp.weight"
        pair = StoredPair(a, a.entries[name], b, b.entries[name], numel=384, chunk=50, resident=resident)
        for start, stop in ((0, 50), (350, 384), (50, 60)):
            w, ft = pair.read(start, stop)
            assert torch.equal(w, before[name].flatten()[start:stop])
            assert torch.equal(ft, after[name].flatten()[start:stop])


def test_cut_file(tmp_path: Path) -> None:
    path = write_model(tmp_path, weights()[0]) / SINGLE
    size = path.stat().st_size
    for length, message in (
        (size - 1, "is cut short: .* ends at byte"),
        (20, "no safetensors file or is cut short"),
    ):
        os.truncate(path, length)
        with pytest.raises(ValueError, match=message):
            read_shard(path)


def test_damaged_header(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    path.write_bytes((10).to_bytes(8, "little") + b"{" * 10 + b"\0" * 40)
    with pytest.raises(ValueError, match="has a damaged header; download it again"):
        read_shard(path)
    path.write_bytes(b"abc")
    with pytest.raises(ValueError, match="is no safetensors file"):
        read_shard(path)


def test_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = write_model(tmp_path, weights()[0]) / SINGLE
    with Checkpoint(tmp_path) as checkpoint:
        os.truncate(path, path.stat().st_size - 100)
        last = max(checkpoint.entries.values(), key=lambda entry: entry.offset)
        with pytest.raises(OSError, match="ended early at byte .*; it was changed meanwhile"):
            checkpoint.tensor(last.name)


def test_quantised_format(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4, dtype=torch.float8_e4m3fn)}, tmp_path / SINGLE)
    with pytest.raises(ValueError, match="a quantised format; FAPM needs the weights themselves"):
        Checkpoint(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Save the model with save_pretrained"):
        shard_paths(tmp_path)
    write_model(tmp_path, weights()[0], shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match="lacks model-00002.*which its index names; download it again"
    ):
        shard_paths(tmp_path)


def test_too_small_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    writer = ShardWriter(tmp_path)
    writer.plan(SINGLE, [Planned("a", "F32", (5,))])
    with pytest.raises(OSError, match="free some space or name another folder"):
        writer.create()


def test_digest_tells_checkpoints_apart(tmp_path: Path) -> None:
    before, _ = weights()
    first = Checkpoint(write_model(tmp_path / "a", before)).digest()
    assert first == Checkpoint(write_model(tmp_path / "b", before)).digest()
    assert first != Checkpoint(write_model(tmp_path / "c", before, shards=2)).digest()


def test_side_files_and_their_order(tmp_path: Path) -> None:
    for folder, names in (("a", ["config.json", "merges.txt", INDEX]), ("b", ["config.json", "run.log"])):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_text(folder)
    found = side_files([tmp_path / "a", tmp_path / "b"])
    assert {name: path.read_text() for name, path in found.items()} == {"config.json": "b", "merges.txt": "a"}


def test_config_says_the_dtype_of_the_weights(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"dtype": "float32", "hidden_size": 3}')
    write_config(tmp_path / "a.json", tmp_path / "b.json", "BF16")
    assert json.loads((tmp_path / "b.json").read_text()) == {"dtype": "bfloat16", "hidden_size": 3}


def test_system_calls_that_move_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may read and write less than asked for, as it does beyond 2 GB; the rest follows."""
    read, write = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda handle, views, at: read(handle, [views[0][:7]], at))
    monkeypatch.setattr(os, "pwrite", lambda handle, view, at: write(handle, view[:5], at))
    values = torch.arange(20.0)
    writer = ShardWriter(tmp_path)
    writer.plan(SINGLE, [Planned("a", "F32", (20,))])
    writer.create()
    writer.write("a", 0, values)
    writer.close(sync=False)
    with Checkpoint(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.tensor("a"), values)


@pytest.mark.parametrize("name", ["../out.safetensors", "/etc/out.safetensors", "a/b.safetensors"])
def test_an_index_cannot_name_a_file_elsewhere(tmp_path: Path, name: str) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(ValueError, match="is not a file of that folder. Do not trust this checkpoint"):
        shard_paths(tmp_path)
