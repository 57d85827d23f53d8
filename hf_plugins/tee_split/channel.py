"""Messages over a connected stream socket: the clear handshake, then sealed frames with deadlines."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from hf_plugins.tee_split.frames import (
    CHUNK_BYTES,
    CLIENT_TO_SERVER,
    HANDSHAKE_BYTES,
    HANDSHAKE_TYPES,
    HEADER,
    SERVER_TO_CLIENT,
    TAG_BYTES,
    Header,
    Opener,
    Sealer,
    num_chunks,
    pack_header,
    unpack_header,
)
from hf_plugins.tee_split.tensors import pack, unpack
from hf_plugins.tee_split.transcript import HandshakeError, Keys


class ChannelClosed(Exception):
    """The stream ended or stood still for too long; a new connection may go on."""


class Message(NamedTuple):
    """One decrypted message."""

    kind: int
    """Frame type."""
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read_exactly(stream: socket.socket, out: memoryview, *, deadline: float) -> None:
    """Fill ``out`` from the stream.

    Args:
        stream: Connected socket.
        out: Where the bytes go.
        deadline: Time of `time.monotonic` at which patience ends; it holds for all bytes together, so that a
            peer that drips single bytes gains nothing.

    Raises:
        ChannelClosed: If the stream ends, breaks or is too slow.
    """
    at = 0
    while at < out.nbytes:
        left = deadline - time.monotonic()
        if left <= 0:
            raise ChannelClosed("the peer was silent for too long")
        try:
            stream.settimeout(left)
            count = stream.recv_into(out[at:])
        except TimeoutError as error:
            raise ChannelClosed("the peer was silent for too long") from error
        except OSError as error:
            raise ChannelClosed("the connection broke while reading") from error
        if count == 0:
            raise ChannelClosed("the peer closed the connection")
        at += count


def _write(stream: socket.socket, pieces: Iterable[memoryview], *, timeout: float) -> int:
    total = 0
    try:
        stream.settimeout(timeout)
        for piece in pieces:
            stream.sendall(piece)
            total += piece.nbytes
    except OSError as error:
        raise ChannelClosed("the connection broke while writing") from error
    return total


def send_clear(stream: socket.socket, kind: int, body: bytes, *, timeout: float) -> None:
    """Send one message of the handshake, in the clear.

    Raises:
        ValueError: If it is longer than any peer accepts.
    """
    if len(body) > HANDSHAKE_BYTES:
        raise ValueError(f"a handshake message has at most {HANDSHAKE_BYTES} bytes; got {len(body)}")
    header = pack_header(Header(kind, 0, 0, 0, len(body)))
    _write(stream, [memoryview(header + body)], timeout=timeout)


def receive_clear(stream: socket.socket, kind: int, *, timeout: float) -> bytes:
    """Receive the handshake message that is due.

    Raises:
        HandshakeError: If anything else comes, or it is too long.
        ChannelClosed: If nothing comes.
    """
    deadline = time.monotonic() + timeout
    raw = bytearray(HEADER.size)
    read_exactly(stream, memoryview(raw), deadline=deadline)
    header = unpack_header(bytes(raw))
    if (
        header.type != kind
        or kind not in HANDSHAKE_TYPES
        or any((header.flags, header.session, header.sequence))
    ):
        raise HandshakeError(f"frame type {header.type} came where {kind} of the handshake was due")
    if header.length > HANDSHAKE_BYTES:
        raise HandshakeError(
            f"a handshake message announces {header.length} bytes; {HANDSHAKE_BYTES} is the bound"
        )
    body = bytearray(header.length)
    read_exactly(stream, memoryview(body), deadline=deadline)
    return bytes(body)


class Channel:
    """Both directions of one session.

    Args:
        stream: Connected socket.
        keys: Of the handshake.
        client: Whether this side is the client.
        max_receive: Longest plaintext read from a frame.
        max_send: Longest plaintext the peer reads.
        timeout: Seconds that a write, or the rest of a frame whose header came, may take.
        bucket: Frames with tensors are padded to a multiple of this many bytes.
        seal_options: Passed to `Sealer` and `Opener` (when keys are renewed).
    """

    def __init__(
        self,
        stream: socket.socket,
        keys: Keys,
        *,
        client: bool,
        max_receive: int,
        max_send: int,
        timeout: float,
        bucket: int = 0,
        seal_options: Mapping[str, Any] | None = None,
    ) -> None:
        up = (keys.client_to_server, CLIENT_TO_SERVER)
        down = (keys.server_to_client, SERVER_TO_CLIENT)
        mine, theirs = (up, down) if client else (down, up)
        options = dict(seal_options or {})
        self._sealer = Sealer(mine[0], direction=mine[1], session=keys.session, **options)
        self._opener = Opener(theirs[0], direction=theirs[1], session=keys.session, **options)
        self._stream, self.timeout, self._bucket = stream, timeout, bucket
        self.session = keys.session
        self.max_receive, self.max_send = max_receive, max_send
        self._sending = threading.Lock()
        self.bytes_sent = 0
        self.bytes_received = 0

    def send_bytes(self, kind: int, parts: list[memoryview]) -> None:
        """Seal and send one frame; calls from several threads take turns.

        Raises:
            ValueError: If it is longer than the peer accepts.
            ChannelClosed: If the stream breaks.
        """
        length = sum(part.nbytes for part in parts)
        if length > self.max_send:
            raise ValueError(
                f"the message has {length} bytes; the peer reads {self.max_send}. Send fewer samples at "
                "once, or raise max_frame_mb on both sides."
            )
        with self._sending:
            self.bytes_sent += _write(self._stream, self._sealer.seal(kind, parts), timeout=self.timeout)

    def send(
        self,
        kind: int,
        metadata: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Send metadata and tensors as one frame."""
        self.send_bytes(kind, pack(metadata or {}, tensors or {}, bucket=self._bucket if tensors else 0))

    def receive_bytes(self, *, timeout: float) -> tuple[int, bytearray]:
        """Receive and open one frame.

        Args:
            timeout: Seconds to wait for its first byte.

        Returns:
            Frame type and plaintext.

        Raises:
            FrameError: If the frame is not the one that is due; the connection must end.
            ChannelClosed: If the stream ends or is silent.
        """
        raw = bytearray(HEADER.size)
        view = memoryview(raw)
        # A header is awaited patiently; once it is there, the rest must follow.
        read_exactly(self._stream, view[:1], deadline=time.monotonic() + timeout)
        deadline = time.monotonic() + self.timeout
        read_exactly(self._stream, view[1:], deadline=deadline)
        header = self._opener.check(bytes(raw), max_bytes=self.max_receive)
        plain = bytearray(header.length)
        out, sealed = memoryview(plain), memoryview(bytearray(min(header.length, CHUNK_BYTES) + TAG_BYTES))
        chunks = num_chunks(header.length)
        for index in range(chunks):
            part = out[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
            piece = sealed[: part.nbytes + TAG_BYTES]
            read_exactly(self._stream, piece, deadline=deadline)
            self._opener.open_chunk(bytes(raw), index, piece, part, last=index == chunks - 1)
        self.bytes_received += HEADER.size + header.length + TAG_BYTES * chunks
        return header.type, plain

    def receive(self, *, timeout: float) -> Message:
        """Receive one message; see `receive_bytes`.

        Raises:
            MessageError: If the frame is authentic and its content makes no sense.
        """
        kind, plain = self.receive_bytes(timeout=timeout)
        return Message(kind, *unpack(plain))

    def close(self) -> None:
        """End the connection; safe to call twice."""
        with contextlib.suppress(OSError):
            self._stream.shutdown(socket.SHUT_RDWR)
        self._stream.close()
