"""The safetensors layout, read and written without holding a file in memory.

A file is 8 bytes of header length, a JSON header (name -> dtype, shape, range of bytes), then the bytes.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHUNK = 1 << 23


class Entry(NamedTuple):
    """One tensor of a file."""

    path: Path
    """File that holds it."""
    dtype: str
    """As safetensors writes it: ``BF16``, ``F32`` ..."""
    shape: tuple[int, ...]
    """Its axes."""
    start: int
    """First byte in the file."""
    num_bytes: int
    """Length in bytes."""


def read_entries(path: Path) -> dict[str, Entry]:
    """Tensors of one file, by name, in the order of their bytes.

    Args:
        path: A safetensors file.

    Returns:
        Name -> place in the file.

    Raises:
        ValueError: If the file is cut short or is no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        # A header is at most 100 MB by the format's definition; more means foreign bytes.
        text = file.read(length) if 0 < length <= min(size, 100_000_000) else b""
    try:
        header: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"{path} is no whole safetensors file: its header cannot be read. Fetch it again."
        ) from error
    header.pop("__metadata__", None)
    entries = {
        name: Entry(path, item["dtype"], tuple(item["shape"]), 8 + length + item["data_offsets"][0],
                    item["data_offsets"][1] - item["data_offsets"][0])
        for name, item in header.items()
    }  # fmt: skip
    end = max((entry.start + entry.num_bytes for entry in entries.values()), default=8 + length)
    if end != size:
        raise ValueError(f"{path} is cut short: {size} bytes, its header speaks of {end}. Fetch it again.")
    return dict(sorted(entries.items(), key=lambda item: item[1].start))


def read_checkpoint(folder: Path) -> dict[str, list[str]]:
    """Weight files of a checkpoint and the tensor names in each, as its index or single file says.

    Raises:
        FileNotFoundError: If there are no safetensors weights.
        ValueError: If index and files do not name the same tensors, or the index names a file elsewhere.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        promised: dict[str, set[str]] = {}
        for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            promised.setdefault(file, set()).add(name)
    elif single.is_file():
        promised = {single.name: set(read_entries(single))}
    else:
        raise FileNotFoundError(
            f"{folder} holds neither model.safetensors nor an index of shards. Load the model and "
            "save_pretrained() it once; pickled .bin weights are not read."
        )
    found = {}
    for file, names in sorted(promised.items()):
        if Path(file).name != file:
            raise ValueError(
                f"the index of {folder} names {file!r}, which is not a file of that folder. Do not trust "
                "this checkpoint; if you moved its shards yourself, put them beside the index."
            )
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"the index names {file}, which is not in {folder}. Fetch the missing shard."
            )
        there = list(read_entries(folder / file))
        if set(there) != names:
            odd = sorted(set(there) ^ names)
            raise ValueError(
                f"index and {file} disagree on tensors {odd[:5]} ({len(odd)} in all). Fetch both again."
            )
        found[file] = there
    return found


class FileMatrix:
    """A matrix inside a file; row blocks are read when asked, without a memory map.

    Args:
        entry: Its place.
    """

    def __init__(self, entry: Entry) -> None:
        if entry.dtype not in FLOATS:
            raise TypeError(
                f"{entry.path.name} holds {entry.dtype}: quantised weights cannot be merged. Run on the "
                "original checkpoint in bf16, fp16 or fp32, or merge nothing (n_merge=0)."
            )
        self.entry, self.dtype = entry, FLOATS[entry.dtype]

    def __getitem__(self, rows: slice) -> Tensor:
        """Rows ``start:stop`` as a tensor of their own; ``[:]`` is the whole."""
        shape = self.entry.shape
        start, stop, _ = rows.indices(shape[0] if shape else 1)
        row_bytes = self.entry.num_bytes // (shape[0] if shape else 1)
        with self.entry.path.open("rb") as file:
            file.seek(self.entry.start + start * row_bytes)
            data = bytearray(file.read((stop - start) * row_bytes))
        return torch.frombuffer(data, dtype=self.dtype).view(stop - start, *shape[1:])


def copy_chunks(entry: Entry) -> Iterator[bytes]:
    """Bytes of a tensor as they are, a few MiB at a time."""
    left = entry.num_bytes
    with entry.path.open("rb") as file:
        file.seek(entry.start)
        while left:
            chunk = file.read(min(CHUNK, left))
            left -= len(chunk)
            yield chunk


def tensor_chunks(tensor: Tensor) -> Iterator[bytes]:
    """Bytes of a tensor in memory, a few MiB at a time."""
    flat = tensor.contiguous().view(torch.uint8).flatten()
    for start in range(0, len(flat), CHUNK):
        yield flat[start : start + CHUNK].numpy().tobytes()


def write_header(file: BinaryIO, entries: Mapping[str, Entry]) -> None:
    """Header of a file that will hold these tensors one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, entry in entries.items():
        header[name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": [offset, offset + entry.num_bytes],
        }
        offset += entry.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    # Data start at a multiple of 8 bytes, as the format recommends.
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
