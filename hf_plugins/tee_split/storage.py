"""Sealed files on the server's disk: the samples of the cache, checkpoints, the trained adapter."""

import collections
import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_plugins.tee_split.batches import Sample, part_samples
from hf_plugins.tee_split.sealing import open_sealed, seal, stretch_key
from hf_plugins.tee_split.tensors import MessageError, pack, unpack
from hf_plugins.whole_files import replacing

MAX_HEADER = 64 * 2**20


def read_sealing_key(path: str | Path, *, create: bool) -> bytes:
    """The key that seals stored files.

    Args:
        path: File with 16 bytes or more, such as Gramine's ``/dev/attestation/keys/_sgx_mrenclave``.
        create: Write a random one, readable by its owner alone, if it is not there (simulator only).

    Raises:
        FileNotFoundError: If it is not there and may not be made.
    """
    path = Path(path)
    if not path.exists():
        if not create:
            raise FileNotFoundError(
                f"no sealing key at {path}: run inside of an enclave that offers it, or name it with "
                "sealing_key"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(os.urandom(32))
    return stretch_key(path.read_bytes())


class SealedStore:
    """A folder in which every file is sealed under its own name and replaced at once.

    Args:
        folder: Made if it is not there.
        key: 32 bytes from `read_sealing_key`.
    """

    def __init__(self, folder: str | Path, key: bytes) -> None:
        self.folder, self._key = Path(folder), key
        self.folder.mkdir(parents=True, exist_ok=True)

    def _path(self, name: str) -> Path:
        if not name or not all(part.replace("-", "").replace("_", "").isalnum() for part in name.split("/")):
            raise ValueError(
                f"a sealed file's name has letters, digits, - and _ between slashes; got {name!r}"
            )
        return self.folder / f"{name}.sealed"

    def __contains__(self, name: str) -> bool:
        return self._path(name).is_file()

    def write(self, name: str, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Seal and write; a reader sees the old file or the new one, never half of one."""
        path = self._path(name)
        with replacing(path) as part, part.open("wb") as file:
            file.writelines(seal(self._key, name, pack(metadata, tensors, max_header=MAX_HEADER)))

    def read(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Open a file.

        Raises:
            SealError: If it is not what was sealed under this name.
        """
        return unpack(open_sealed(self._key, name, self._path(name).read_bytes()), max_header=MAX_HEADER)


def folder_tensors(folder: Path) -> dict[str, Tensor]:
    """All files below a folder as byte tensors, by relative path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): _bytes(path) for path in paths}


def _bytes(path: Path) -> Tensor:
    raw = path.read_bytes()
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)


def write_folder(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write what `folder_tensors` read; nothing outside of ``folder``.

    Raises:
        MessageError: If a name would leave the folder, or is no byte tensor.
    """
    root = folder.resolve()
    for name, tensor in tensors.items():
        path = (root / name).resolve()
        if not path.is_relative_to(root) or path == root or tensor.dtype != torch.uint8 or tensor.dim() != 1:
            raise MessageError(f"{name!r} is no file of this folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tensor.numpy().tobytes())


class ShardShelf:
    """The shards of one client in the store, numbered from 0 without gaps.

    Args:
        store: Where they lie.
        client: Whose they are.
    """

    def __init__(self, store: SealedStore, client: str) -> None:
        self.store, self.client = store, client
        # Two connections of one client may overlap for a moment.
        self._adding = threading.Lock()
        self.count = 0
        while self._name(self.count) in store:
            self.count += 1

    def _name(self, number: int) -> str:
        return f"shards/{self.client}/{number}"

    @property
    def complete(self) -> bool:
        """Whether the client said that this is all."""
        return f"shards/{self.client}/complete" in self.store

    def add(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Store the next shard; one that is there already is left as it is.

        Raises:
            MessageError: If a number is left out, or the client has said that nothing follows.
        """
        with self._adding:
            if number < self.count:
                return
            if number > self.count or self.complete:
                raise MessageError(f"shard {number} came where {self.count} was due")
            self.store.write(self._name(number), {"client": self.client}, tensors)
            self.count += 1

    def finish(self, num_shards: int) -> None:
        """Note that all shards are there.

        Raises:
            MessageError: If the client counts otherwise.
        """
        if num_shards != self.count or not num_shards:
            raise MessageError(f"the client counts {num_shards} shards, {self.count} are here")
        self.store.write(f"shards/{self.client}/complete", {"num_shards": num_shards}, {})

    def read(self, number: int) -> list[Sample]:
        """Open one shard."""
        return part_samples(self.store.read(self._name(number))[1])


class SealedDataset(Dataset):
    """The samples of all clients for a stock Trainer, opened when they are asked for.

    Args:
        shelves: One per client; samples follow their order.
        cached_shards: Shards kept open in the enclave's memory.
    """

    def __init__(self, shelves: list[ShardShelf], *, cached_shards: int = 8) -> None:
        self._cached, self._open = cached_shards, collections.OrderedDict[tuple[int, int], list[Sample]]()
        self._shelves = shelves
        self._index = [
            (which, number, row)
            for which, shelf in enumerate(shelves)
            for number in range(shelf.count)
            for row in range(len(self._shard(which, number)))
        ]

    def _shard(self, which: int, number: int) -> list[Sample]:
        key = (which, number)
        if key not in self._open:
            self._open[key] = self._shelves[which].read(number)
            while len(self._open) > self._cached:
                self._open.popitem(last=False)
        self._open.move_to_end(key)
        return self._open[key]

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Sample:
        which, number, row = self._index[index]
        return self._shard(which, number)[row]


def remove_folder(folder: Path) -> None:
    """Remove a folder of plaintext for good; it lies in memory, so nothing stays on a disk."""
    shutil.rmtree(folder, ignore_errors=False)


def read_json(path: str | Path) -> Any:
    """A JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))
