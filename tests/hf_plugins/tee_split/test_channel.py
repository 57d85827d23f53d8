"""Messages over a socket pair: round trips, bounds checked before memory, deadlines, and a fuzz run."""

import os
import random
import resource
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from hf_plugins.tee_split.channel import Channel, ChannelClosed, receive_clear, send_clear
from hf_plugins.tee_split.frames import (
    ACK,
    DATA,
    EVIDENCE,
    HANDSHAKE_BYTES,
    HELLO,
    FrameError,
    Header,
    Sealer,
    pack_header,
)
from hf_plugins.tee_split.tensors import MessageError, pack
from hf_plugins.tee_split.transcript import HandshakeError, ServerHandshake, derive_keys

Ends = tuple[socket.socket, socket.socket]
KEYS = derive_keys(bytes(32), b"hello", b"evidence")


def channel(stream: socket.socket, *, client: bool, **changes: object) -> Channel:
    given = {"max_receive": 2**20, "max_send": 2**20, "timeout": 2.0, **changes}
    return Channel(stream, KEYS, client=client, **given)


@pytest.fixture
def ends() -> Iterator[Ends]:
    near, far = socket.socketpair()
    yield near, far
    near.close()
    far.close()


def test_both_ways(ends: Ends) -> None:
    client, server = channel(ends[0], client=True), channel(ends[1], client=False)
    x = torch.randn(4, 5)
    for number in range(3):
        client.send(DATA, {"n": number}, {"x": x})
        kind, metadata, tensors = server.receive(timeout=2)
        assert (kind, metadata) == (DATA, {"n": number})
        assert torch.equal(tensors["x"], x)
        server.send(ACK, {"n": number})
        assert client.receive(timeout=2).metadata == {"n": number}
    assert client.bytes_sent == server.bytes_received
    assert client.bytes_received == server.bytes_sent


def test_large_message_needs_both_ends(ends: Ends) -> None:
    client, server = channel(ends[0], client=True), channel(ends[1], client=False)
    x = torch.randn(200_000)
    sender = threading.Thread(target=client.send, args=(DATA, {}, {"x": x}))
    sender.start()
    assert torch.equal(server.receive(timeout=2).tensors["x"], x)
    sender.join()


def test_what_the_peer_will_not_read_is_not_sent(ends: Ends) -> None:
    with pytest.raises(ValueError, match="raise max_frame_mb on both sides"):
        channel(ends[0], client=True, max_send=100).send(DATA, {}, {"x": torch.zeros(100)})


def test_announced_length_is_refused_before_memory_is_taken(ends: Ends) -> None:
    ends[0].sendall(pack_header(Header(DATA, 0, KEYS.session, 0, 2**62)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FrameError, match="1048576 were negotiated"):
        channel(ends[1], client=False).receive(timeout=2)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_silence_end_and_dripping_end_the_wait(ends: Ends) -> None:
    server = channel(ends[1], client=False, timeout=0.3)
    start = time.monotonic()
    with pytest.raises(ChannelClosed, match="silent for too long"):
        server.receive(timeout=0.1)
    raw = pack_header(Header(DATA, 0, KEYS.session, 0, 10))

    def drip() -> None:
        for byte in raw:
            ends[0].sendall(bytes([byte]))
            if stop.wait(0.05):
                return

    stop = threading.Event()
    dripping = threading.Thread(target=drip)
    dripping.start()
    with pytest.raises(ChannelClosed, match="silent for too long"):
        server.receive(timeout=1)
    stop.set()
    dripping.join()
    assert time.monotonic() - start < 2
    ends[0].close()
    with pytest.raises(ChannelClosed, match="peer closed the connection|broke while reading"):
        server.receive(timeout=1)


def test_broken_stream_while_writing_and_reading(ends: Ends) -> None:
    client = channel(ends[0], client=True)
    client.close()
    client.close()
    with pytest.raises(ChannelClosed, match="broke while writing"):
        client.send(DATA, {}, {})
    with pytest.raises(ChannelClosed, match="broke while reading"):
        client.receive(timeout=1)


def test_clear_messages_are_bounded_and_in_order(ends: Ends) -> None:
    send_clear(ends[0], HELLO, b"hi", timeout=1)
    assert receive_clear(ends[1], HELLO, timeout=1) == b"hi"
    send_clear(ends[0], HELLO, b"hi", timeout=1)
    with pytest.raises(FrameError, match="of the handshake was due"):
        receive_clear(ends[1], EVIDENCE, timeout=1)
    with pytest.raises(ValueError, match="a handshake message has at most"):
        send_clear(ends[0], HELLO, bytes(HANDSHAKE_BYTES + 1), timeout=1)


def test_long_clear_message_is_refused(ends: Ends) -> None:
    ends[0].sendall(pack_header(Header(HELLO, 0, 0, 0, HANDSHAKE_BYTES + 1)))
    with pytest.raises(FrameError, match="a handshake message announces"):
        receive_clear(ends[1], HELLO, timeout=1)


def test_authentic_nonsense_is_a_message_error_and_the_channel_goes_on(ends: Ends) -> None:
    client, server = channel(ends[0], client=True), channel(ends[1], client=False)
    client.send_bytes(DATA, [memoryview(b"no safetensors")])
    client.send(DATA, {"n": 1})
    with pytest.raises(MessageError, match="that is too many"):
        server.receive(timeout=1)
    assert server.receive(timeout=1).metadata == {"n": 1}


def frame(generator: random.Random) -> bytes:
    sealer = Sealer(KEYS.client_to_server, direction=1, session=KEYS.session)
    parts = pack({"n": 1}, {"x": torch.zeros(generator.randrange(1, 40))})
    return b"".join(bytes(piece) for piece in sealer.seal(DATA, parts))


def mutated(raw: bytes, generator: random.Random) -> bytes:
    changed = bytearray(raw)
    for _ in range(generator.randrange(1, 4)):
        way = generator.randrange(5)
        at = generator.randrange(len(changed)) if changed else 0
        if way == 0 and changed:
            changed[at] ^= 1 << generator.randrange(8)
        elif way == 1:
            changed[at:at] = generator.randbytes(generator.randrange(1, 9))
        elif way == 2:
            del changed[at : at + generator.randrange(1, 9)]
        elif way == 3:
            del changed[at:]
        else:
            changed[at : at + 8] = (2 ** generator.randrange(64) - 1).to_bytes(8, "big")
    return bytes(changed)


def fuzz(count: int, seed: int) -> None:
    """Mutated frames and handshakes: each ends in one of the room's own errors, within its deadline, in no
    memory."""
    generator = random.Random(seed)
    hello = _hello()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        near, far = socket.socketpair()
        with near, far:
            if number % 2:
                raw = frame(generator)
                changed = mutated(raw, generator)
                near.sendall(changed)
                near.shutdown(socket.SHUT_WR)
                if changed == raw:
                    continue
                try:
                    found = channel(far, client=False).receive(timeout=2)
                except (FrameError, ChannelClosed):
                    continue
                # Only bytes behind an untouched frame may remain; then nothing of the change was accepted.
                assert changed.startswith(raw), found
            else:
                # Most mutations hit the JSON inside of a well-formed frame.
                body = mutated(hello, generator)[:HANDSHAKE_BYTES]
                near.sendall(pack_header(Header(HELLO, 0, 0, 0, len(body))) + body)
                try:
                    ServerHandshake(receive_clear(far, HELLO, timeout=2))
                except HandshakeError:
                    continue
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100_000


def _hello() -> bytes:
    from hf_plugins.tee_split.transcript import ClientHandshake

    return ClientHandshake({"cut": 2}, tees=("sim",), max_frame=1000).hello


def test_fuzzed_frames_and_handshakes() -> None:
    fuzz(600, seed=0)


@pytest.mark.slow
def test_many_fuzzed_frames_and_handshakes() -> None:
    fuzz(20_000, seed=int.from_bytes(os.urandom(4), "big"))
