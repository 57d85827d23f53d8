"""Model folders of safetensors shards, read and written in flat ranges of a tensor: no shard is ever loaded.

Plain ``pread`` into buffers that are reused: pages of a memory map would count as the process's own.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_plugins.recipes import check_shard_names

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
BLOCK = 4 << 20
# Headers above this are damaged files; safetensors itself refuses them as well.
MAX_HEADER = 100 << 20


class Entry(NamedTuple):
    """One tensor of a shard."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    """Name of the file."""
    offset: int
    """Where the bytes begin in the file."""

    @property
    def numel(self) -> int:
        """Entries."""
        return prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes an entry."""
        return DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Shard:
    """Head of one file."""

    name: str
    header: bytes
    """The JSON text, as it stands in the file, padding included."""
    size: int
    """Bytes of the whole file."""
    entries: tuple[Entry, ...]

    @property
    def metadata(self) -> dict[str, str]:
        """What the writer noted."""
        return json.loads(self.header).get("__metadata__", {})


def read_shard(path: Path) -> Shard:
    """Head of a safetensors file, checked against the file's length.

    Args:
        path: The file.

    Returns:
        Its header and tensors.

    Raises:
        ValueError: If the file is cut short or damaged, or a dtype is not one of a plain checkpoint.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise ValueError(
                f"{path} is no safetensors file or is cut short ({size} bytes); download it again."
            )
        header = file.read(length)
    try:
        found = json.loads(header)
    except ValueError as error:
        raise ValueError(f"{path} has a damaged header; download it again.") from error
    entries = []
    for name, entry in found.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{name} in {path} is stored as {entry['dtype']}, a quantised format; FAPM needs the weights "
                "themselves. Use the unquantised checkpoint."
            )
        start, stop = entry["data_offsets"]
        item = Entry(name, entry["dtype"], tuple(entry["shape"]), path.name, 8 + length + start)
        if stop - start != item.numel * item.itemsize or item.offset + stop - start > size:
            raise ValueError(
                f"{path} is cut short: {name} ends at byte {8 + length + stop} of {size}; download it again."
            )
        entries.append(item)
    return Shard(path.name, header, size, tuple(sorted(entries, key=lambda item: item.offset)))


def shard_paths(folder: Path) -> list[Path]:
    """Files of a model or adapter folder, in the order of their names.

    Raises:
        FileNotFoundError: If there is none, or one that the index names is missing.
    """
    if (folder / INDEX).is_file():
        names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        check_shard_names(folder, names)
        paths = [folder / name for name in sorted(set(names))]
    else:
        paths = [folder / name for name in (SINGLE, ADAPTER) if (folder / name).is_file()][:1]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}, which its index names; download it again."
        )
    if not paths:
        raise FileNotFoundError(
            f"{folder} holds neither {SINGLE} nor {INDEX} nor {ADAPTER}. Save the model with "
            "save_pretrained; a sharded FSDP or DeepSpeed checkpoint must be consolidated first (`accelerate "
            "merge-weights`, zero_to_fp32.py)."
        )
    return paths


class Checkpoint:
    """A folder of safetensors shards, open for reading."""

    def __init__(self, folder: str | Path, *, files: Sequence[str] = ()) -> None:
        self.folder = Path(folder)
        paths = [self.folder / name for name in files] or shard_paths(self.folder)
        self.shards = [read_shard(path) for path in paths]
        self.entries = {entry.name: entry for shard in self.shards for entry in shard.entries}
        self._files: dict[str, int] = {}

    def config(self) -> dict[str, Any]:
        """config.json, empty where there is none."""
        path = self.folder / "config.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def read_into(self, entry: Entry, start: int, buffer: Tensor) -> Tensor:
        """Fill ``buffer`` (flat, of the entry's dtype) with entries from ``start`` on; returns it.

        Raises:
            OSError: If the file ends early: it was changed while it was read.
        """
        if entry.shard not in self._files:
            self._files[entry.shard] = os.open(self.folder / entry.shard, os.O_RDONLY)
        view = memoryview(buffer.view(torch.uint8).numpy())
        place = entry.offset + start * entry.itemsize
        while view:
            count = os.preadv(self._files[entry.shard], [view], place)
            if count == 0:
                raise OSError(
                    f"{self.folder / entry.shard} ended early at byte {place}; it was changed meanwhile."
                )
            view, place = view[count:], place + count
        return buffer

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, for the small ones."""
        entry = self.entries[name]
        flat = torch.empty(entry.numel, dtype=DTYPES[entry.dtype])
        return self.read_into(entry, 0, flat).view(entry.shape)

    def digest(self) -> str:
        """Hash of all headers and file sizes: enough to tell two checkpoints apart without reading them."""
        found = hashlib.sha256()
        for shard in self.shards:
            found.update(shard.name.encode() + shard.size.to_bytes(8, "little") + shard.header)
        return found.hexdigest()

    def close(self) -> None:
        """Close the files."""
        for handle in self._files.values():
            os.close(handle)
        self._files.clear()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class StoredPair:
    """A tensor of two checkpoints as a `score.Pair`; read once where both fit into ``resident`` bytes."""

    def __init__(
        self,
        base: Checkpoint,
        base_entry: Entry,
        tuned: Checkpoint,
        tuned_entry: Entry,
        *,
        numel: int,
        chunk: int,
        resident: int,
    ) -> None:
        self.numel = numel
        self._sides = ((base, base_entry), (tuned, tuned_entry))
        total = numel * (base_entry.itemsize + tuned_entry.itemsize)
        size = numel if total <= resident else min(chunk, numel)
        self._buffers = tuple(torch.empty(size, dtype=DTYPES[entry.dtype]) for _, entry in self._sides)
        self._whole = size == numel
        if self._whole:
            self._fill(0, numel)

    def _fill(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        base, tuned = (
            checkpoint.read_into(entry, start, buffer[: stop - start])
            for (checkpoint, entry), buffer in zip(self._sides, self._buffers, strict=True)
        )
        return base, tuned

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Entries [start, stop) of both; the next call may overwrite them."""
        if self._whole:
            return self._buffers[0][start:stop], self._buffers[1][start:stop]
        return self._fill(start, stop)


class Planned(NamedTuple):
    """One tensor of the output."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def _header(tensors: Sequence[Planned], metadata: Mapping[str, str]) -> bytes:
    found: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for item in tensors:
        size = prod(item.shape) * DTYPES[item.dtype].itemsize
        found[item.name] = {
            "dtype": item.dtype,
            "shape": list(item.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(found, separators=(",", ":")).encode()
    # The format wants the data to begin at a multiple of 8.
    return text + b" " * (-len(text) % 8)


class ShardWriter:
    """Safetensors files of known size, filled at their offsets in any order by any process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self._heads: dict[str, tuple[bytes, int]] = {}
        self._files: dict[str, int] = {}

    def plan(self, shard: str, tensors: Sequence[Planned], *, like: Shard | None = None) -> None:
        """Lay out one file; the header of ``like`` is taken over as it is where the tensors are the same."""
        same = like is not None and [(e.name, e.dtype, e.shape) for e in like.entries] == list(tensors)
        header = (
            like.header if like and same else _header(tensors, like.metadata if like else {"format": "pt"})
        )
        offset = 8 + len(header)
        for item in tensors:
            self.entries[item.name] = Entry(item.name, item.dtype, item.shape, shard, offset)
            offset += prod(item.shape) * DTYPES[item.dtype].itemsize
        if like and same:
            for entry in like.entries:
                self.entries[entry.name] = entry._replace(shard=shard)
        self._heads[shard] = (header, offset)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self._heads.values())

    def create(self) -> None:
        """Write the headers and take the space on disk; one process does this.

        Raises:
            OSError: If the disk is too small.
        """
        free = shutil.disk_usage(self.folder).free
        if free < self.size:
            raise OSError(
                f"{self.folder} has {free / 1e9:.2f} GB free, the output needs {self.size / 1e9:.2f} GB; "
                "free some space or name another folder."
            )
        for shard, (header, size) in self._heads.items():
            with (self.folder / shard).open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
                file.write(len(header).to_bytes(8, "little") + header)

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Put flat values (of the planned dtype) at entry ``start`` of a tensor."""
        entry = self.entries[name]
        if entry.shard not in self._files:
            self._files[entry.shard] = os.open(self.folder / entry.shard, os.O_WRONLY)
        view = memoryview(values.contiguous().view(torch.uint8).numpy())
        place = entry.offset + start * entry.itemsize
        while view:
            count = os.pwrite(self._files[entry.shard], view, place)
            view, place = view[count:], place + count

    def close(self, *, sync: bool) -> None:
        """Close the files, after waiting for the disk if ``sync``."""
        for handle in self._files.values():
            if sync:
                os.fsync(handle)
            os.close(handle)
        self._files.clear()

    def write_index(self) -> None:
        """The index of several shards; a single file has none."""
        if list(self._heads) == [SINGLE]:
            return
        total = sum(entry.numel * entry.itemsize for entry in self.entries.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: entry.shard for name, entry in sorted(self.entries.items())},
        }
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


_SIDE_FILES = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken")
_NOT_COPIED = (INDEX, "trainer_state.json", "adapter_config.json", "fapm.json", "all_results.json")


def side_files(folders: Iterable[Path]) -> dict[str, Path]:
    """Configs and tokenizer files of a model; the last folder that has a name gives the file."""
    return {
        path.name: path
        for folder in folders
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in _SIDE_FILES and path.name not in _NOT_COPIED
    }


def write_config(source: Path, target: Path, dtype: str) -> None:
    """Copy config.json with the dtype that the weights have, so that ``dtype="auto"`` keeps it."""
    config = json.loads(source.read_text(encoding="utf-8"))
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = str(DTYPES[dtype]).removeprefix("torch.")
    target.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
