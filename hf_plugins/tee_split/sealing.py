"""Blobs at rest: sealed with a key of their own, bound to their name, opened only whole.

The layout is that of a frame of the channel, behind a random salt from which the blob's key is derived
together with the store's key and the name; so a sealed file cannot be put in another one's place.
"""

import os

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hf_plugins.tee_split.frames import (
    AT_REST,
    CHUNK_BYTES,
    DATA,
    HEADER,
    KEY_BYTES,
    TAG_BYTES,
    FrameError,
    Opener,
    Sealer,
    num_chunks,
)

SALT_BYTES = 32
MAX_BLOB_BYTES = 2**40


class SealError(Exception):
    """A sealed blob was changed, cut, exchanged, or sealed with another key."""


def _key(master: bytes, salt: bytes, name: str) -> bytes:
    return HKDF(
        algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=b"tee-split/1 seal " + name.encode()
    ).derive(master)


def stretch_key(raw: bytes) -> bytes:
    """A 32-byte sealing key from a hardware-derived one of 16 bytes or more.

    Raises:
        ValueError: If it is shorter.
    """
    if len(raw) < 16:
        raise ValueError(f"a sealing key has at least 16 bytes; got {len(raw)}")
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=b"tee-split/1 sealing key").derive(raw)


def seal(master: bytes, name: str, parts: list[memoryview]) -> list[bytes]:
    """Seal the joined parts under a name.

    Args:
        master: The store's key, 32 bytes.
        name: What the blob is; needed to open it.
        parts: Byte views.

    Returns:
        Byte strings whose concatenation is the sealed blob.
    """
    salt = os.urandom(SALT_BYTES)
    sealer = Sealer(_key(master, salt, name), direction=AT_REST, session=0)
    return [salt, *(bytes(piece) for piece in sealer.seal(DATA, parts))]


def open_sealed(master: bytes, name: str, blob: bytes) -> bytearray:
    """Open a sealed blob.

    Args:
        master: The store's key.
        name: The name it was sealed under.
        blob: As `seal` made it.

    Returns:
        The plaintext.

    Raises:
        SealError: If it is not exactly what was sealed under this name with this key.
    """
    view = memoryview(blob)
    start = SALT_BYTES + HEADER.size
    raw = bytes(view[SALT_BYTES:start])
    opener = Opener(_key(master, bytes(view[:SALT_BYTES]), name), direction=AT_REST, session=0)
    try:
        header = opener.check(raw, max_bytes=MAX_BLOB_BYTES)
        chunks = num_chunks(header.length)
        if view.nbytes != start + header.length + TAG_BYTES * chunks:
            raise SealError(f"sealed {name!r} is cut or has bytes too many")
        plain = bytearray(header.length)
        out = memoryview(plain)
        for index in range(chunks):
            part = out[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
            piece = view[start : start + part.nbytes + TAG_BYTES]
            opener.open_chunk(raw, index, piece, part, last=index == chunks - 1)
            start += piece.nbytes
    except FrameError as error:
        raise SealError(f"sealed {name!r} was changed, exchanged, or sealed with another key") from error
    return plain
