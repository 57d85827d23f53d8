"""Sealed store, shards and the dataset over them."""

import stat
from pathlib import Path

import pytest
import torch

from hf_plugins.tee_split.batches import Sample, join_samples
from hf_plugins.tee_split.sealing import SealError
from hf_plugins.tee_split.storage import (
    SealedDataset,
    SealedStore,
    ShardShelf,
    folder_tensors,
    read_json,
    read_sealing_key,
    remove_folder,
    write_folder,
)
from hf_plugins.tee_split.tensors import MessageError


@pytest.fixture
def store(tmp_path: Path) -> SealedStore:
    return SealedStore(tmp_path / "store", bytes(32))


def shard(*sizes: int) -> dict[str, torch.Tensor]:
    return join_samples(
        [Sample(torch.full((n, 2), float(n)), torch.full((n,), n, dtype=torch.int32)) for n in sizes]
    )


def test_what_is_written_is_read_and_never_plain(store: SealedStore) -> None:
    x = torch.arange(64, dtype=torch.uint8)
    store.write("some/name", {"step": 3}, {"x": x})
    metadata, tensors = store.read("some/name")
    assert metadata == {"step": 3}
    assert torch.equal(tensors["x"], x)
    assert "some/name" in store
    raw = (store.folder / "some" / "name.sealed").read_bytes()
    assert all(bytes(x[i : i + 16].tolist()) not in raw for i in range(48))
    assert not list(store.folder.rglob("*.part"))


def test_file_in_another_ones_place_is_refused(store: SealedStore) -> None:
    store.write("a", {}, {})
    (store.folder / "a.sealed").rename(store.folder / "b.sealed")
    with pytest.raises(SealError, match="exchanged"):
        store.read("b")


@pytest.mark.parametrize("name", ["", "../a", "a/../b", "a b", "/a"])
def test_names_stay_inside(store: SealedStore, name: str) -> None:
    with pytest.raises(ValueError, match="letters, digits, - and _ between slashes"):
        store.write(name, {}, {})


def test_sealing_key_is_private_and_made_only_when_asked(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run inside of an enclave that offers it"):
        read_sealing_key(tmp_path / "key", create=False)
    first = read_sealing_key(tmp_path / "key", create=True)
    assert read_sealing_key(tmp_path / "key", create=True) == first
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_folders_travel_as_tensors_and_stay_inside(tmp_path: Path) -> None:
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "deep" / "x.json").write_text('{"a": 1}')
    (tmp_path / "a" / "empty").write_text("")
    tensors = folder_tensors(tmp_path / "a")
    write_folder(tensors, tmp_path / "b")
    assert read_json(tmp_path / "b" / "deep" / "x.json") == {"a": 1}
    assert (tmp_path / "b" / "empty").read_bytes() == b""
    for name in ("../out", "/etc/x", ""):
        with pytest.raises(MessageError, match="is no file of this folder"):
            write_folder({name: torch.zeros(1, dtype=torch.uint8)}, tmp_path / "b")
    remove_folder(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_shards_come_in_order_once_and_survive_a_restart(store: SealedStore) -> None:
    shelf = ShardShelf(store, "alice")
    shelf.add(0, shard(2))
    with pytest.raises(MessageError, match="shard 2 came where 1 was due"):
        shelf.add(2, shard(1))
    shelf = ShardShelf(store, "alice")
    assert shelf.count == 1
    shelf.add(0, shard(7, 7))
    assert [len(sample.labels_T) for sample in shelf.read(0)] == [2]
    with pytest.raises(MessageError, match="the client counts .*5 shards, 1 are here"):
        shelf.finish(5)
    shelf.finish(1)
    assert ShardShelf(store, "alice").complete
    with pytest.raises(MessageError, match="came where"):
        shelf.add(1, shard(1))
    assert ShardShelf(store, "bob").count == 0


def test_dataset_holds_all_clients_samples_in_order(store: SealedStore) -> None:
    shelves = [ShardShelf(store, name) for name in ("alice", "bob")]
    shelves[0].add(0, shard(1, 2))
    shelves[0].add(1, shard(3))
    shelves[1].add(0, shard(4, 5))
    dataset = SealedDataset(shelves, cached_shards=1)
    order = [4, 0, 3, 1, 2]
    assert len(dataset) == 5
    assert [len(dataset[i].labels_T) for i in range(5)] == [1, 2, 3, 4, 5]
    assert [len(dataset[i].labels_T) for i in order] == [i + 1 for i in order]
    assert len(dataset._open) == 1
