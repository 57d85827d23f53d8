"""The safetensors layout: agrees with the safetensors package, refuses whatever does not add up."""

import json

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_plugins.tee_split.tensors import DTYPES, MessageError, pack, unpack

X = torch.arange(6, dtype=torch.float32).view(2, 3)


def joined(parts: list[memoryview]) -> bytearray:
    return bytearray(b"".join(bytes(part) for part in parts))


def message(head: object, data: bytes = b"") -> bytearray:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return bytearray(len(text).to_bytes(8, "little") + text + data)


def entry(**changes: object) -> dict:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 0, 4), (2, 3, 4, 5)], ids=str)
def test_round_trip_is_bit_equal(dtype: torch.dtype, shape: tuple) -> None:
    x = torch.randn(shape).mul(100).to(dtype)
    metadata, tensors = unpack(joined(pack({"step": 3, "name": "a"}, {"x": x})))
    assert metadata == {"step": 3, "name": "a"}
    assert tensors["x"].dtype == dtype
    assert tensors["x"].shape == x.shape
    assert torch.equal(tensors["x"], x)


def test_safetensors_package_reads_what_is_written_and_the_other_way() -> None:
    found = safetensors.torch.load(bytes(joined(pack({"a": 1}, {"x": X, "y": X.to(torch.bfloat16)}))))
    assert torch.equal(found["x"], X)
    assert torch.equal(unpack(bytearray(safetensors.torch.save({"x": X})))[1]["x"], X)


def test_tensors_share_the_memory_of_the_message() -> None:
    buffer = joined(pack({}, {"x": X}))
    x = unpack(buffer)[1]["x"]
    buffer[-4:] = bytes(4)
    assert x[1, 2] == 0


def test_views_share_the_memory_of_the_tensor() -> None:
    assert pack({}, {"x": X})[1].nbytes == X.nbytes
    y = X.clone()
    view = pack({}, {"y": y})[1]
    y.zero_()
    assert bytes(view) == bytes(24)


@given(st.integers(1, 5000), st.integers(1, 4096))
@settings(max_examples=60, deadline=None)
def test_bucket_hides_sizes(size: int, bucket: int) -> None:
    parts = pack({"step": 1}, {"x": torch.zeros(size, dtype=torch.uint8)}, bucket=bucket)
    assert sum(part.nbytes for part in parts) % bucket == 0
    assert unpack(joined(parts))[1]["x"].shape == (size,)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (bytearray(b"1234"), "shorter than its length field"),
        (bytearray((2**60).to_bytes(8, "little")), "that is too many"),
        (message(b"{nope"), "header is no JSON"),
        (message(b"[" * 5000), "header is no JSON"),
        (message([1]), "no JSON object"),
        (message({"__metadata__": {"a": 1}}), "metadata must be texts"),
        (message({"__metadata__": {"a": "{"}}), "metadata is no JSON"),
        (message({"x": {"dtype": "F32"}}, bytes(8)), "not described by dtype, shape and data_offsets"),
        (message({"x": entry(dtype="O")}, bytes(8)), "dtype that is not on the list"),
        (message({"x": entry(dtype=[])}, bytes(8)), "dtype that is not on the list"),
        (message({"x": entry(shape=[-2])}, bytes(8)), "no valid shape"),
        (message({"x": entry(shape=[2.0])}, bytes(8)), "no valid shape"),
        (message({"x": entry(shape=[True, 2])}, bytes(8)), "no valid shape"),
        (message({"x": entry(shape=[1] * 5)}, bytes(8)), "no valid shape"),
        (message({"x": entry(shape=[2**40, 2**40])}, bytes(8)), "do not agree"),
        (message({"x": entry(shape=[3])}, bytes(8)), "do not agree"),
        (message({"x": entry(data_offsets=[0])}, bytes(8)), "no valid offsets"),
        (message({"x": entry(data_offsets=[4, 12])}, bytes(12)), "does not lie where"),
        (message({"x": entry()}, bytes(4)), "does not lie where"),
        (message({"x": entry()}, bytes(9)), "bytes that belong to no tensor"),
        (message({"x": entry(), "y": entry()}, bytes(8)), "does not lie where"),
    ],
)
def test_whatever_does_not_add_up_is_refused(raw: bytearray, words: str) -> None:
    with pytest.raises(MessageError, match=words):
        unpack(raw)


def test_misaligned_tensor_of_another_writer_is_copied() -> None:
    raw = message({"x": entry()} | {"__metadata__": {}}, X.numpy().tobytes()[:8])
    assert unpack(raw)[1]["x"].tolist() == [0.0, 1.0]


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_mutated_messages_are_refused_or_read_never_worse(data: st.DataObject) -> None:
    raw = joined(pack({"step": 1}, {"x": X, "y": X.to(torch.int64)}))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        unpack(raw)
    except MessageError:
        pass


def test_unsendable_dtype_and_long_header() -> None:
    with pytest.raises(TypeError, match="the wire takes"):
        pack({}, {"x": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="Send fewer tensors"):
        pack({"a": "b" * 70_000}, {})
