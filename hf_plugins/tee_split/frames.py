"""Frames of the encrypted channel: a clear header that is authenticated, then chunks sealed with
AES-256-GCM.

Nonces are counters, never random: 1 byte direction, 3 bytes key epoch, 8 bytes chunk counter. A receiver
computes the only nonce it accepts, so a frame that is replayed, reordered, cut or changed fails its tag.
"""

import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

MAGIC = b"TEES"
VERSION = 1
# Magic, version, type, flags, session, sequence, length of the plaintext.
HEADER = struct.Struct(">4sBBHQQQ")
CHUNK_BYTES = 256 * 1024
TAG_BYTES = 16
KEY_BYTES = 32
FLAG_REKEY = 1
HANDSHAKE_BYTES = 64 * 1024
"""Bound of every message before keys exist."""
MAX_EPOCH = 2**24 - 1
REKEY_CHUNKS = 2**30
REKEY_SECONDS = 3600.0

HELLO, EVIDENCE = 1, 2
FINISHED, RESUME, DATA, STEP, ACK, RESULT, TRAIN, PROGRESS, FETCH, ADAPTER, ERROR, HEARTBEAT, BYE = range(
    3, 16
)
HANDSHAKE_TYPES = frozenset({HELLO, EVIDENCE})

CLIENT_TO_SERVER, SERVER_TO_CLIENT, AT_REST = 1, 2, 3


class FrameError(Exception):
    """The peer sent something that no honest peer sends; the connection ends without an answer."""


class Header(NamedTuple):
    """The clear part of a frame."""

    type: int
    """One of the type constants of this file."""
    flags: int
    """`FLAG_REKEY` or 0."""
    session: int
    """Identifier both sides derived from the handshake; 0 before it."""
    sequence: int
    """Counter of the frame's first chunk."""
    length: int
    """Bytes of the plaintext."""


def pack_header(header: Header) -> bytes:
    """The 32 bytes of a header."""
    return HEADER.pack(MAGIC, VERSION, *header)


def unpack_header(raw: bytes) -> Header:
    """Parse a header, before anything is allocated.

    Args:
        raw: Exactly 32 bytes.

    Returns:
        The parsed header.

    Raises:
        FrameError: If size, magic, version, type or flags are wrong.
    """
    if len(raw) != HEADER.size:
        raise FrameError(f"a frame header has {HEADER.size} bytes; got {len(raw)}")
    magic, version, *rest = HEADER.unpack(raw)
    if magic != MAGIC or version != VERSION:
        raise FrameError("the peer does not speak tee-split/1: wrong magic or version")
    header = Header(*rest)
    if not HELLO <= header.type <= BYE or header.flags & ~FLAG_REKEY:
        raise FrameError(f"unknown frame type {header.type} or flags {header.flags}")
    return header


def num_chunks(length: int) -> int:
    """Sealed chunks of a plaintext; an empty one still has a chunk, whose tag protects the header."""
    return max(1, -(-length // CHUNK_BYTES))


def sealed_bytes(length: int) -> int:
    """Bytes on the wire of a frame with ``length`` bytes of plaintext."""
    return HEADER.size + length + TAG_BYTES * num_chunks(length)


def _next_key(key: bytes) -> bytes:
    return HKDFExpand(algorithm=SHA256(), length=KEY_BYTES, info=b"tee-split/1 ratchet").derive(key)


class _Direction:
    """Key, epoch and counter of one direction; the counter never goes back, not even after a new key."""

    def __init__(
        self,
        key: bytes,
        *,
        direction: int,
        session: int,
        rekey_chunks: int = REKEY_CHUNKS,
        rekey_seconds: float = REKEY_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._key, self._cipher = key, AESGCM(key)
        self._prefix = bytes([direction])
        self.session = session
        self.epoch = 0
        self.counter = 0
        self._epoch_start = 0
        self._rekey_chunks, self._rekey_seconds = rekey_chunks, rekey_seconds
        self._clock, self._since = clock, clock()

    def _ratchet(self) -> None:
        if self.epoch >= MAX_EPOCH:
            raise FrameError("all key epochs of this session are used; connect anew")
        # The old key is forgotten: who takes the machine later cannot read what was sent before.
        self._key = _next_key(self._key)
        self._cipher = AESGCM(self._key)
        self.epoch += 1
        self._epoch_start, self._since = self.counter, self._clock()

    def _nonce(self) -> bytes:
        nonce = self._prefix + self.epoch.to_bytes(3, "big") + self.counter.to_bytes(8, "big")
        self.counter += 1
        return nonce

    def _exhausted(self, more: int) -> bool:
        return self.counter + more - self._epoch_start > self._rekey_chunks


def _associated(header: bytes, index: int, *, last: bool) -> bytes:
    return header + index.to_bytes(4, "big") + bytes([last])


class Sealer(_Direction):
    """Turns messages into sealed frames.

    Args of the constructor: key of 32 bytes, direction, session, and when the key is renewed.
    """

    def seal(self, kind: int, parts: Sequence[memoryview]) -> Iterator[memoryview]:
        """Yield the header and the sealed chunks of one frame; each is valid until the next is asked for.

        Args:
            kind: Frame type.
            parts: Byte views that follow one another in the plaintext; read, never copied as a whole.
        """
        length = sum(part.nbytes for part in parts)
        chunks = num_chunks(length)
        flags = 0
        if self._exhausted(chunks) or self._clock() - self._since > self._rekey_seconds:
            self._ratchet()
            flags = FLAG_REKEY
        header = pack_header(Header(kind, flags, self.session, self.counter, length))
        yield memoryview(header)
        buffer = memoryview(bytearray(min(length, CHUNK_BYTES) + TAG_BYTES))
        for index, piece in enumerate(_pieces(parts)):
            sealed = buffer[: piece.nbytes + TAG_BYTES]
            self._cipher.encrypt_into(
                self._nonce(), piece, _associated(header, index, last=index == chunks - 1), sealed
            )
            yield sealed


def _pieces(parts: Sequence[memoryview]) -> Iterator[memoryview]:
    """The joined parts in pieces of `CHUNK_BYTES`; only a piece that spans two parts is copied."""
    left = memoryview(bytearray(CHUNK_BYTES))
    held, yielded = 0, False
    for part in parts:
        at = 0
        while at < part.nbytes:
            if held == 0 and part.nbytes - at >= CHUNK_BYTES:
                yield part[at : at + CHUNK_BYTES]
                at, yielded = at + CHUNK_BYTES, True
                continue
            take = min(CHUNK_BYTES - held, part.nbytes - at)
            left[held : held + take] = part[at : at + take]
            held, at = held + take, at + take
            if held == CHUNK_BYTES:
                yield left
                held, yielded = 0, True
    if held or not yielded:
        yield left[:held]


class Opener(_Direction):
    """Opens the frames of one direction, in order, each once.

    Args of the constructor: key of 32 bytes, direction, session, and when the peer must renew its key.
    """

    def check(self, raw: bytes, *, max_bytes: int) -> Header:
        """Check a header before anything is allocated for its payload.

        Args:
            raw: The 32 bytes read.
            max_bytes: Longest plaintext that was negotiated.

        Returns:
            The header; the payload that follows must be opened next.

        Raises:
            FrameError: If session, counter or length are not the ones expected.
        """
        header = unpack_header(raw)
        if header.session != self.session or header.type in HANDSHAKE_TYPES:
            raise FrameError("the frame belongs to another session")
        if header.sequence != self.counter:
            raise FrameError(f"frame counter {header.sequence} came where {self.counter} was due")
        if header.length > max_bytes:
            raise FrameError(f"the frame announces {header.length} bytes; {max_bytes} were negotiated")
        if header.flags & FLAG_REKEY:
            self._ratchet()
        if self._exhausted(num_chunks(header.length)):
            raise FrameError("the peer did not renew its key in time")
        return header

    def open_chunk(self, raw: bytes, index: int, sealed: memoryview, out: memoryview, *, last: bool) -> None:
        """Open one chunk into ``out``.

        Args:
            raw: The header's 32 bytes.
            index: Number of the chunk within its frame.
            sealed: Ciphertext and tag.
            out: Where the plaintext goes, ``len(sealed) - 16`` bytes.
            last: Whether the frame ends here.

        Raises:
            FrameError: If the tag does not fit.
        """
        try:
            self._cipher.decrypt_into(self._nonce(), sealed, _associated(raw, index, last=last), out)
        except InvalidTag as error:
            raise FrameError("a chunk failed its tag: it was changed, replayed or cut") from error
