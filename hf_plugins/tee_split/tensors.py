"""Tensors as bytes in the safetensors layout (8-byte length, JSON, raw data), both ways without a copy.

Nothing is ever unpickled. Whatever a peer can write into the JSON is checked against the bytes that are
really there before a tensor is made of them.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MAX_HEADER_BYTES = 64 * 1024
MAX_RANK = 4
METADATA = "__metadata__"
DTYPES = {
    "F32": torch.float32,
    "F64": torch.float64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class MessageError(Exception):
    """A message that authenticates but makes no sense; it is answered with ERROR and not applied."""


def raw_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, as a view that shares its memory."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.detach().view(-1).view(torch.uint8).numpy().data.cast("B")


def pack(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    bucket: int = 0,
    max_header: int = MAX_HEADER_BYTES,
) -> list[memoryview]:
    """Views whose concatenation is a safetensors file.

    Args:
        metadata: Values that JSON can hold; each is stored as JSON text.
        tensors: Tensors by name; moved to the CPU and made contiguous where they are not.
        bucket: Pad the whole to a multiple of this many bytes, so that its size tells less; 0 pads nothing.
        max_header: Longest JSON part; the reader must allow as much.

    Returns:
        The views, header first; they keep the tensors alive.

    Raises:
        TypeError: If a dtype has no name in this layout.
        ValueError: If the header grows past its bound.
    """
    at, entries, views = 0, {}, []
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise TypeError(f"tensor {name!r} has dtype {tensor.dtype}; the wire takes {sorted(DTYPES)}")
        view = raw_view(tensor.detach().cpu().contiguous())
        entries[name] = _entry(NAMES[tensor.dtype], tensor.shape, at, at + view.nbytes)
        at += view.nbytes
        views.append(view)
    head = {METADATA: {key: json.dumps(value) for key, value in metadata.items()}, **entries}
    if bucket:
        # One more entry of zeros; its own description lengthens the header, so room is left for that.
        filled = 8 + len(_json(head)) + at + 128
        zeros = bytes(-filled % bucket)
        head["_pad"] = _entry("U8", [len(zeros)], at, at + len(zeros))
        views.append(memoryview(zeros))
        text = _json(head).ljust(filled - at - 8)
    else:
        text = _json(head)
        text = text.ljust(len(text) + -len(text) % 8)
    if len(text) > max_header:
        raise ValueError(f"the header has {len(text)} bytes; {max_header} is the bound. Send fewer tensors.")
    return [memoryview(len(text).to_bytes(8, "little") + text), *views]


def _json(head: Mapping[str, Any]) -> bytes:
    return json.dumps(head, separators=(",", ":")).encode()


def _entry(dtype: str, shape: Sequence[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def unpack(
    buffer: bytearray, *, max_header: int = MAX_HEADER_BYTES
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a received message.

    Args:
        buffer: The whole plaintext; the tensors share its memory.
        max_header: Longest JSON part that is parsed.

    Returns:
        Metadata with its values parsed, and tensors by name.

    Raises:
        MessageError: If the layout, a dtype, a shape or an offset is wrong, or bytes are left over.
    """
    if len(buffer) < 8:
        raise MessageError("a message is shorter than its length field")
    size = int.from_bytes(buffer[:8], "little")
    if size > max_header or 8 + size > len(buffer):
        raise MessageError(f"the message's header says {size} bytes; that is too many")
    try:
        head = json.loads(bytes(buffer[8 : 8 + size]))
    except (ValueError, RecursionError) as error:
        raise MessageError("the message's header is no JSON") from error
    if not isinstance(head, dict):
        raise MessageError("the message's header is no JSON object")
    metadata = _metadata(head.pop(METADATA, {}))
    data, expected, tensors = memoryview(buffer)[8 + size :], 0, {}
    for name, entry in head.items():
        dtype, shape, start, end = _checked(name, entry)
        if start != expected or end > data.nbytes:
            raise MessageError(f"tensor {name!r} does not lie where the one before it ends")
        expected = end
        if name != "_pad":
            tensors[name] = _tensor(data[start:end], dtype, shape)
    if expected != data.nbytes:
        raise MessageError("the message has bytes that belong to no tensor")
    return metadata, tensors


def _metadata(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise MessageError("the message's metadata must be texts")
    try:
        return {key: json.loads(value) for key, value in found.items()}
    except (ValueError, RecursionError) as error:
        raise MessageError("a value of the message's metadata is no JSON") from error


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _checked(name: str, entry: Any) -> tuple[torch.dtype, list[int], int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise MessageError(f"tensor {name!r} is not described by dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise MessageError(f"tensor {name!r} has a dtype that is not on the list")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(map(_is_size, shape)):
        raise MessageError(f"tensor {name!r} has no valid shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise MessageError(f"tensor {name!r} has no valid offsets")
    dtype, count = DTYPES[entry["dtype"]], 1
    for side in shape:
        count *= side
    if count * dtype.itemsize != offsets[1] - offsets[0]:
        raise MessageError(f"shape and bytes of tensor {name!r} do not agree")
    return dtype, shape, offsets[0], offsets[1]


def _tensor(data: memoryview, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    if data.nbytes == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    flat = torch.frombuffer(data, dtype=torch.uint8)
    if flat.data_ptr() % dtype.itemsize:
        # Another writer need not pad its header to 8 bytes; a misaligned tensor is undefined behaviour.
        flat = flat.clone()
    return flat.view(dtype).view(tuple(shape))
