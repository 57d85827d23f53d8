"""Frames: layout, nonces, ratchet; and that nothing changed, replayed, reordered or cut is ever accepted."""

import itertools
import random
import struct

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_plugins.tee_split import frames
from hf_plugins.tee_split.frames import (
    CHUNK_BYTES,
    DATA,
    FLAG_REKEY,
    HEADER,
    TAG_BYTES,
    FrameError,
    Header,
    Opener,
    Sealer,
    num_chunks,
    pack_header,
    sealed_bytes,
    unpack_header,
)
from tests.hf_plugins.tee_split.reference import nonce

KEY = bytes(range(32))


def pair(**options: object) -> tuple[Sealer, Opener]:
    given = {"direction": 1, "session": 77, **options}
    return Sealer(KEY, **given), Opener(KEY, **given)


def sealed(sealer: Sealer, *parts: bytes) -> bytes:
    return b"".join(bytes(piece) for piece in sealer.seal(DATA, [memoryview(part) for part in parts]))


def opened(opener: Opener, raw: bytes, max_bytes: int = 2**24) -> bytes:
    header = opener.check(raw[: HEADER.size], max_bytes=max_bytes)
    out, at, chunks = bytearray(header.length), HEADER.size, num_chunks(header.length)
    for index in range(chunks):
        part = memoryview(out)[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
        piece = memoryview(raw)[at : at + part.nbytes + TAG_BYTES]
        if piece.nbytes < part.nbytes + TAG_BYTES:
            raise FrameError("the stream ended")
        opener.open_chunk(raw[: HEADER.size], index, piece, part, last=index == chunks - 1)
        at += piece.nbytes
    return bytes(out)


def test_header_by_hand() -> None:
    """4 + 1 + 1 + 2 + 8 + 8 + 8 = 32 bytes, big-endian."""
    raw = pack_header(Header(DATA, 0, 7, 9, 11))
    assert raw == b"TEES" + bytes([1, DATA, 0, 0]) + struct.pack(">QQQ", 7, 9, 11)
    assert len(raw) == 32
    assert unpack_header(raw) == Header(DATA, 0, 7, 9, 11)


@given(st.lists(st.integers(0, 3 * CHUNK_BYTES), max_size=3))
@settings(max_examples=25, deadline=None)
def test_round_trip(sizes: list[int]) -> None:
    sealer, opener = pair()
    parts = [random.Random(i).randbytes(size) for i, size in enumerate(sizes)]
    raw = sealed(sealer, *parts)
    assert len(raw) == sealed_bytes(sum(sizes))
    assert opened(opener, raw) == b"".join(parts)


def test_chunks_are_plain_aes_gcm_with_the_stated_nonce_and_associated_data() -> None:
    sealer, _ = pair()
    sealed(sealer, b"first")
    raw = sealed(sealer, b"abc")
    expected = AESGCM(KEY).encrypt(nonce(1, 0, 1), b"abc", raw[:32] + (0).to_bytes(4, "big") + b"\x01")
    assert raw[32:] == expected


def test_any_flipped_bit_is_refused() -> None:
    raw = sealed(pair()[0], b"some payload")
    for bit in range(8 * len(raw)):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FrameError):
            opened(pair()[1], bytes(changed))


def test_replayed_reordered_and_cut_frames_are_refused() -> None:
    sealer, opener = pair()
    first, second = sealed(sealer, b"one"), sealed(sealer, b"two")
    with pytest.raises(FrameError, match="came where 0 was due"):
        opened(opener, second)
    assert opened(opener, first) == b"one"
    with pytest.raises(FrameError, match="frame counter 0 came where"):
        opened(opener, first)
    long = sealed(pair()[0], bytes(2 * CHUNK_BYTES))
    shorter = bytearray(long[: HEADER.size + CHUNK_BYTES + TAG_BYTES])
    shorter[24:32] = CHUNK_BYTES.to_bytes(8, "big")
    with pytest.raises(FrameError, match="a chunk failed its tag"):
        opened(pair()[1], bytes(shorter))
    swapped = long[:32] + long[32 + CHUNK_BYTES + 16 :] + long[32 : 32 + CHUNK_BYTES + 16]
    with pytest.raises(FrameError, match="a chunk failed its tag"):
        opened(pair()[1], swapped)


def test_other_direction_session_or_key_is_refused() -> None:
    raw = sealed(pair()[0], b"x")
    with pytest.raises(FrameError, match="a chunk failed its tag"):
        opened(pair(direction=2)[1], raw)
    with pytest.raises(FrameError, match="belongs to another session"):
        opened(pair(session=78)[1], raw)
    with pytest.raises(FrameError, match="a chunk failed its tag"):
        opened(Opener(bytes(32), direction=1, session=77), raw)


def test_header_is_refused_before_anything_is_allocated() -> None:
    opener = pair()[1]
    with pytest.raises(FrameError, match="the frame announces .* bytes; 64 were negotiated"):
        opener.check(pack_header(Header(DATA, 0, 77, 0, 2**63)), max_bytes=64)
    with pytest.raises(FrameError, match="wrong magic or version"):
        unpack_header(b"HTTP" + bytes(28))
    with pytest.raises(FrameError, match="unknown frame type 99"):
        unpack_header(pack_header(Header(99, 0, 0, 0, 0)))
    with pytest.raises(FrameError, match="unknown frame type"):
        unpack_header(pack_header(Header(DATA, 2, 0, 0, 0)))
    with pytest.raises(FrameError, match="a frame header has .*32 bytes; got 31"):
        unpack_header(bytes(31))


def test_ratchet_by_count_keeps_both_sides_in_step() -> None:
    sealer, opener = pair(rekey_chunks=3)
    for number in range(20):
        assert opened(opener, sealed(sealer, bytes([number]))) == bytes([number])
    assert sealer.epoch == opener.epoch == 6
    assert sealer.counter == 20


def test_ratchet_by_time_forgets_the_old_key() -> None:
    now = [0.0]
    sealer, opener = pair(clock=lambda: now[0])
    opened(opener, sealed(sealer, b"a"))
    now[0] = 3601.0
    raw = sealed(sealer, b"b")
    assert unpack_header(raw[:32]).flags == FLAG_REKEY
    assert opened(opener, raw) == b"b"
    assert sealer._key != KEY
    assert sealer._key == frames._next_key(KEY)


def test_a_peer_that_does_not_renew_its_key_is_refused() -> None:
    sealer, _ = pair()
    _, opener = pair(rekey_chunks=2)
    for _ in range(2):
        opened(opener, sealed(sealer, b"a"))
    with pytest.raises(FrameError, match="did not renew its key"):
        opened(opener, sealed(sealer, b"a"))


def test_epochs_run_out_instead_of_wrapping() -> None:
    sealer, _ = pair(rekey_chunks=1)
    sealer.epoch = frames.MAX_EPOCH
    sealed(sealer, b"a")
    with pytest.raises(FrameError, match="all key epochs of this session are used"):
        sealed(sealer, b"b")


def _nonces(count: int, monkeypatch: pytest.MonkeyPatch) -> int:
    seen: set[tuple[bytes, bytes]] = set()
    sealer, _ = pair(rekey_chunks=1000)
    original = Sealer._nonce

    def note(self: Sealer) -> bytes:
        made = original(self)
        seen.add((self._key, made))
        return made

    monkeypatch.setattr(Sealer, "_nonce", note)
    view = [memoryview(b"x")]
    for _ in range(count):
        for _ in sealer.seal(DATA, view):
            pass
    return len(seen)


def test_nonces_never_repeat_under_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _nonces(20_000, monkeypatch) == 20_000


@pytest.mark.slow
def test_a_million_frames_never_repeat_a_nonce(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _nonces(1_000_000, monkeypatch) == 1_000_000


def test_sealing_never_copies_the_whole() -> None:
    """Whole chunks of a part are encrypted from where they lie."""
    part = memoryview(bytearray(3 * CHUNK_BYTES))
    pieces = list(itertools.islice(frames._pieces([part]), 3))
    assert all(piece.obj is part.obj for piece in pieces)
