"""Blobs at rest: open only whole, unchanged, under their own name and key."""

import pytest

from hf_plugins.tee_split.frames import CHUNK_BYTES
from hf_plugins.tee_split.sealing import SealError, open_sealed, seal, stretch_key

KEY = bytes(32)


def made(data: bytes, name: str = "a") -> bytes:
    return b"".join(seal(KEY, name, [memoryview(data)]))


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 5])
def test_round_trip(size: int) -> None:
    data = bytes(i % 251 for i in range(size))
    assert open_sealed(KEY, "a", made(data)) == data
    assert len(data) < 16 or data[:16] not in made(data)


def test_two_seals_of_the_same_differ() -> None:
    assert made(b"same") != made(b"same")


def test_every_flipped_byte_is_found() -> None:
    blob = made(b"payload")
    for at in range(len(blob)):
        changed = bytearray(blob)
        changed[at] ^= 1
        with pytest.raises(
            SealError, match="was changed, exchanged, or sealed with another key|is cut or has bytes"
        ):
            open_sealed(KEY, "a", bytes(changed))


def test_other_name_key_or_length_is_refused() -> None:
    blob = made(b"payload")
    for key, name in ((KEY, "b"), (bytes([1]) * 32, "a")):
        with pytest.raises(SealError, match="exchanged, or sealed with another key"):
            open_sealed(key, name, blob)
    for wrong in (blob[:-1], blob + b"x"):
        with pytest.raises(SealError, match="is cut or has bytes too many"):
            open_sealed(KEY, "a", wrong)
    with pytest.raises(SealError, match="was changed"):
        open_sealed(KEY, "a", b"short")


def test_hardware_keys_of_16_bytes_are_stretched() -> None:
    assert len(stretch_key(bytes(16))) == 32
    assert stretch_key(bytes(16)) != stretch_key(bytes(17))
    with pytest.raises(ValueError, match="a sealing key has at least .*15"):
        stretch_key(bytes(15))
