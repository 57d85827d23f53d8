"""The client: checks what the server is, encodes samples with the front layers, sends them sealed, and comes
back after any break."""

import contextlib
import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from torch import Tensor
from transformers import PreTrainedModel

from hf_plugins.tee_split.ahead import ahead
from hf_plugins.tee_split.attestation import Attested, Policy, verify_evidence
from hf_plugins.tee_split.batches import Sample, join_samples
from hf_plugins.tee_split.channel import Channel, ChannelClosed, Message, receive_clear, send_clear
from hf_plugins.tee_split.config import ClientConfig
from hf_plugins.tee_split.frames import (
    ACK,
    ADAPTER,
    BYE,
    DATA,
    ERROR,
    EVIDENCE,
    FETCH,
    FINISHED,
    HEARTBEAT,
    HELLO,
    PROGRESS,
    RESULT,
    RESUME,
    STEP,
    TRAIN,
    FrameError,
)
from hf_plugins.tee_split.model import hidden_states, load_half, model_digest
from hf_plugins.tee_split.storage import write_folder
from hf_plugins.tee_split.transcript import (
    ClientHandshake,
    HandshakeError,
    Identity,
    check_server_finished,
    client_finished,
)

logger = logging.getLogger(__name__)
Value = TypeVar("Value")
FIRST_PAUSE, LAST_PAUSE = 1.0, 60.0
MIB = 2**20


class ServerRefusedError(RuntimeError):
    """The server understood a request and will not do it; asking again does not help."""


class RollbackError(RuntimeError):
    """The server came back with an older state than the one it said was sealed."""


def read_identity(config: ClientConfig) -> Identity:
    """The client's name and key.

    Raises:
        ValueError: If the file holds neither an Ed25519 key nor a pre-shared key.
    """
    raw = Path(config.key_file).read_bytes()
    if not raw.startswith(b"-----BEGIN"):
        return Identity(config.name, psk=raw)
    key = load_pem_private_key(raw, password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{config.key_file} holds no Ed25519 key; make one with `mmhf tee-split keygen`")
    return Identity(config.name, signing_key=key)


def _bound(terms: Mapping[str, Any], own: int) -> int:
    """The longer message neither side would read is not sent."""
    theirs = terms.get("max_frame")
    if type(theirs) is not int or theirs < 1:
        raise HandshakeError("the server's terms name no max_frame")
    return min(own, theirs)


def policy_of(config: ClientConfig) -> Policy:
    """What the options accept as evidence."""
    measurements: dict[str, tuple[str, ...]] = {}
    for line in config.measurements:
        name, value = line.split("=", 1)
        measurements[name] = (*measurements.get(name, ()), value)
    return Policy(
        kinds=tuple(config.tees),
        measurements=measurements,
        tcb_statuses=tuple(config.tcb_statuses),
        collateral=None if config.collateral is None else Path(config.collateral).read_text(encoding="utf-8"),
        allow_simulated=config.allow_simulated,
        simulator_key=None if config.simulator_key is None else bytes.fromhex(config.simulator_key),
    )


@dataclass
class _Window:
    """One optimizer step's micro-batches, kept until the server has them sealed."""

    step: int
    micros: list[tuple[dict[str, Tensor], int]] = field(default_factory=list)
    learning_rate: float | None = None
    losses: list[float] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)


class SplitClient:
    """One client's end.

    Args:
        config: Options.
        identity: Name and key; read from ``config.key_file`` by default.
        policy: What is accepted as evidence; made from the options by default.
        front: The client's half; loaded from ``config.model`` when it is first needed, by default.
    """

    def __init__(
        self,
        config: ClientConfig,
        *,
        identity: Identity | None = None,
        policy: Policy | None = None,
        front: PreTrainedModel | None = None,
    ) -> None:
        self.config = config
        self._identity = identity or read_identity(config)
        self._policy = policy or policy_of(config)
        self._front = front
        self._terms = {**config.terms(), "model": model_digest(config.model)}
        self._channel: Channel | None = None
        self._sender = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tee-split-send")
        self._sent: deque[Future] = deque()
        self._windows: deque[_Window] = deque()
        self._applied = self._sealed = 0
        self.attested: Attested | None = None
        self.server_terms: dict[str, Any] = {}
        self.bytes_sent = 0
        self.bytes_received = 0

    # ---- connection ----

    def connect(self) -> dict[str, Any]:
        """Connect, verify the server, prove who we are, and ask where we stand. Nothing is retried.

        Returns:
            The server's answer: shards it has, last applied step, state of training.

        Raises:
            AttestationError: If the server proves less than the policy asks for.
            FrameError: If it breaks the protocol, or works under other terms.
            ChannelClosed: If it cannot be reached or closes the connection.
            RollbackError: If it lost a state that it had called sealed.
        """
        self.disconnect()
        address = (self.config.host, self.config.port)
        try:
            stream = socket.create_connection(address, timeout=self.config.connect_timeout)
        except OSError as error:
            raise ChannelClosed(f"no server at {address[0]}:{address[1]}: {error}") from error
        try:
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            channel = self._handshake(stream)
            channel.send(RESUME)
            standing = self._expect(channel, RESUME).metadata
            self._check_standing(standing)
            # Only a server that passed every check is ever used.
            self._channel = channel
        finally:
            if self._channel is None:
                stream.close()
        return standing

    def _handshake(self, stream: socket.socket) -> Channel:
        timeout = self.config.request_timeout
        handshake = ClientHandshake(
            self._terms,
            tees=tuple(self.config.tees),
            kem=self.config.kem,
            max_frame=self.config.max_frame_mb * MIB,
        )
        send_clear(stream, HELLO, handshake.hello, timeout=timeout)
        raw = receive_clear(stream, EVIDENCE, timeout=timeout)
        kind, evidence, report_data, terms = handshake.read_evidence(raw)
        self.attested = verify_evidence(kind, evidence, report_data, self._policy)
        self.server_terms = terms
        logger.info("[%s] server verified", self.attested.label())
        keys = handshake.keys(raw)
        channel = Channel(
            stream,
            keys,
            client=True,
            max_receive=self.config.max_frame_mb * MIB,
            max_send=_bound(terms, self.config.max_frame_mb * MIB),
            timeout=timeout,
            bucket=self.config.frame_bucket,
        )
        channel.send_bytes(FINISHED, [memoryview(client_finished(keys, self._identity))])
        answer, finished = channel.receive_bytes(timeout=timeout)
        if answer != FINISHED:
            raise FrameError("the server sent data before FINISHED")
        check_server_finished(bytes(finished), keys)
        return channel

    def _check_standing(self, standing: Mapping[str, Any]) -> None:
        applied, durable = standing.get("applied", 0), standing.get("durable", 0)
        if applied < self._sealed:
            raise RollbackError(
                f"the server is at step {applied}, but had sealed step {self._sealed}: its store was set "
                "back. Find out who did that before any data are sent again."
            )
        self._sealed = max(self._sealed, durable)

    def _receive(self, kind: int) -> Message:
        assert self._channel is not None, "connected"
        return self._expect(self._channel, kind)

    def _expect(self, channel: Channel, kind: int) -> Message:
        message = channel.receive(timeout=self.config.request_timeout)
        if message.kind == ERROR:
            code, reason = message.metadata.get("code"), message.metadata.get("reason")
            raise ServerRefusedError(f"the server refused: {code}: {reason}")
        if message.kind != kind:
            raise FrameError(f"message type {message.kind} came where {kind} was due")
        return message

    def disconnect(self) -> None:
        """Close the connection, if there is one; what is being sent is given up."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
            for sent in self._sent:
                with contextlib.suppress(ChannelClosed):
                    sent.result()
            self.bytes_sent += channel.bytes_sent
            self.bytes_received += channel.bytes_received
        self._sent.clear()

    def close(self) -> None:
        """Say goodbye and close; the server need not wait for this client any more."""
        if self._channel is not None:
            with contextlib.suppress(ChannelClosed):
                self._channel.send(BYE)
        self.disconnect()
        self._sender.shutdown()

    def __enter__(self) -> "SplitClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _with_retries(self, work: Callable[[], Value]) -> Value:
        """Do ``work``, connecting first where needed; after a break wait, connect anew and do it again."""
        pause, failures = FIRST_PAUSE, 0
        while True:
            try:
                if self._channel is None:
                    self._reconnect()
                return work()
            except (HandshakeError, ServerRefusedError):
                # Asking again does not help, and what was sent ahead has answers that nobody waits for.
                self.disconnect()
                raise
            except (ChannelClosed, FrameError) as error:
                self.disconnect()
                failures += 1
                if failures > self.config.num_retries:
                    raise ChannelClosed(
                        f"gave up after {self.config.num_retries} attempts to reach {self.config.host}:"
                        f"{self.config.port}; last: {error}"
                    ) from error
                logger.warning("connection lost (%s); attempt %d in %.0f s", error, failures, pause)
                time.sleep(pause)
                pause = min(2 * pause, LAST_PAUSE)

    def _reconnect(self) -> None:
        standing = self.connect()
        self._replay(standing.get("applied", 0))

    # ---- encoding ----

    @property
    def front(self) -> PreTrainedModel:
        """The client's half, loaded when first asked for."""
        if self._front is None:
            half = load_half(
                self.config.model, self.config.cut, "client", dtype=getattr(torch, self.config.dtype)
            )
            logger.info("front loaded: %d bytes read", half.bytes_read)
            self._front = half.model
        return self._front

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> list[Sample]:
        """Hidden states of samples behind layer k-1; on this machine, never sent unsealed.

        Args:
            rows: ``input_ids`` and, if they differ, ``labels``; cut at ``max_tokens``.

        Returns:
            One sample per row.
        """
        out: list[Sample] = []
        device = next(self.front.parameters()).device
        for start in range(0, len(rows), self.config.encode_batch_size):
            group = rows[start : start + self.config.encode_batch_size]
            ids = [torch.as_tensor(row["input_ids"])[: self.config.max_tokens] for row in group]
            labels = [
                torch.as_tensor(row.get("labels", row["input_ids"]))[: self.config.max_tokens]
                for row in group
            ]
            longest = max(len(row) for row in ids)
            padded = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in ids]).to(
                device
            )
            mask = torch.stack([(torch.arange(longest) < len(row)).long() for row in ids]).to(device)
            hidden = hidden_states(self.front, padded, mask).cpu()
            out += [
                Sample(hidden[row, : len(labels[row])], labels[row].to(torch.int32))
                for row in range(len(group))
            ]
        return out

    def encode_batch(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`encode` for a padded batch, joined for the wire."""
        sizes = inputs["attention_mask"].sum(1).tolist()
        rows = [
            {"input_ids": ids[:size], "labels": labels[:size].cpu()}
            for ids, labels, size in zip(inputs["input_ids"].cpu(), inputs["labels"], sizes, strict=True)
        ]
        return join_samples(self.encode(rows))

    # ---- cache mode ----

    def upload(
        self, rows: Sequence[Mapping[str, Any]], *, report: Callable[[int, int], None] | None = None
    ) -> int:
        """Encode and send all samples once; goes on where an earlier upload ended.

        Args:
            rows: Samples, in the same order on every attempt.
            report: Called with shards sent and shards in all.

        Returns:
            Number of shards on the server.

        Raises:
            ValueError: If there are no samples.
            ChannelClosed: If the server stays away for all attempts.
        """
        if not len(rows):
            raise ValueError("there are no samples to upload")
        size = self.config.shard_samples
        total = -(-len(rows) // size)

        def shards(first: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
            for number in range(first, total):
                picked = [rows[i] for i in range(number * size, min((number + 1) * size, len(rows)))]
                yield number, join_samples(self.encode(picked))

        def send() -> int:
            assert self._channel is not None, "connected"
            self._channel.send(RESUME)
            standing = self._receive(RESUME).metadata
            waiting = 0
            if not standing["complete"]:
                with contextlib.closing(ahead(shards(standing["shards"]), self.config.ahead)) as encoded:
                    for number, tensors in encoded:
                        self._channel.send(DATA, {"shard": number}, tensors)
                        waiting += 1
                        if waiting > self.config.ahead:
                            self._receive(ACK)
                            waiting -= 1
                        if report is not None:
                            report(number + 1, total)
                for _ in range(waiting):
                    self._receive(ACK)
            self._channel.send(TRAIN, {"num_shards": total})
            self._receive(PROGRESS)
            return total

        return self._with_retries(send)

    def train(self, *, report: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
        """Wait until the server has trained, however long that takes; the client may also leave and come
        back.

        Args:
            report: Called with the server's progress: state, step, num_steps, loss.

        Returns:
            The last progress.
        """
        pause = 0.05
        while True:
            progress = self._with_retries(self._ask_progress)
            if report is not None:
                report(progress)
            if progress["state"] == "done":
                return progress
            time.sleep(pause)
            pause = min(2 * pause, self.config.heartbeat)

    def _ask_progress(self) -> dict[str, Any]:
        assert self._channel is not None, "connected"
        self._channel.send(HEARTBEAT)
        return self._receive(PROGRESS).metadata

    def fetch(self, folder: str | Path) -> Path:
        """Fetch the trained adapter.

        Args:
            folder: Where its files go.

        Returns:
            The folder.

        Raises:
            ServerRefusedError: If it is not released to this client, or training has not ended.
        """

        def ask() -> dict[str, Tensor]:
            assert self._channel is not None, "connected"
            self._channel.send(FETCH)
            return self._receive(ADAPTER).tensors

        tensors = self._with_retries(ask)
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_folder(tensors, Path(folder))
        return Path(folder)

    # ---- stream mode ----

    def micro(self, tensors: dict[str, Tensor], *, num_items: int) -> None:
        """Send one micro-batch; its loss comes with `losses`.

        Args:
            tensors: From `encode_batch`.
            num_items: Predicted tokens of the whole accumulation window.
        """
        if not self._windows or self._windows[-1].learning_rate is not None:
            self._windows.append(_Window(step=self._applied + 1))
        self._windows[-1].micros.append((tensors, num_items))
        number = len(self._windows[-1].micros) - 1
        if self._channel is None:
            # Connecting replays the open window, this micro-batch included.
            self._with_retries(lambda: None)
        else:
            self._post(self._windows[-1], number)

    def _post(self, window: _Window, number: int) -> None:
        assert self._channel is not None, "connected"
        tensors, num_items = window.micros[number]
        metadata = {"step": window.step, "micro": number, "num_items": num_items}
        self._sent.append(self._sender.submit(self._channel.send, DATA, metadata, tensors))
        while len(self._sent) > self.config.ahead:
            # A break shows itself again where the result is awaited, and is repaired there.
            with contextlib.suppress(ChannelClosed):
                self._sent.popleft().result()

    def losses(self) -> list[float]:
        """Wait for all losses of the open window.

        Returns:
            One per micro-batch, in order.
        """
        window = self._windows[-1]
        self._with_retries(lambda: self._collect(window))
        return window.losses

    def _collect(self, window: _Window) -> None:
        while len(window.losses) < len(window.micros):
            message = self._receive(RESULT)
            if message.metadata.get("step") != window.step or message.metadata.get("micro") != len(
                window.losses
            ):
                raise FrameError("a result came for another micro-batch")
            window.losses.append(float(message.metadata["loss"]))
            if "gradient" in message.tensors:
                window.gradients.append(message.tensors["gradient"].clone())

    def micro_both_ways(self, samples: Sequence[Sample], *, num_items: int) -> tuple[float, Tensor]:
        """Send one micro-batch and wait for its loss and gradient (bidirectional mode).

        Returns:
            The loss, and the gradient of the joined hidden states.
        """
        self.micro(
            join_samples([Sample(s.hidden_TD.cpu(), s.labels_T.cpu()) for s in samples]), num_items=num_items
        )
        window = self._windows[-1]
        self.losses()
        return window.losses[-1], window.gradients[-1]

    def step(self, learning_rate: float) -> dict[str, Any]:
        """Let the server apply the open window.

        Args:
            learning_rate: Of this step.

        Returns:
            Last applied and last sealed step, and the gradient's norm.
        """
        window = self._windows[-1]
        window.learning_rate = learning_rate
        reply = self._with_retries(lambda: self._send_step(window))
        self._note(reply)
        return reply

    def _send_step(self, window: _Window) -> dict[str, Any]:
        assert self._channel is not None, "connected"
        # Results still under way come first.
        self._collect(window)
        self._channel.send(STEP, {"step": window.step, "learning_rate": window.learning_rate})
        return self._receive(ACK).metadata

    def _note(self, reply: Mapping[str, Any]) -> None:
        self._applied = max(self._applied, reply["applied"])
        self._sealed = max(self._sealed, reply["durable"])
        while (
            self._windows
            and self._windows[0].step <= self._sealed
            and self._windows[0].learning_rate is not None
        ):
            self._windows.popleft()

    def _replay(self, applied: int) -> None:
        """Send again what the server has lost: whole steps it had not sealed, then the open window."""
        for window in list(self._windows):
            if window.step <= applied:
                continue
            losses = window.losses
            window.losses, window.gradients = [], []
            for number in range(len(window.micros)):
                self._post(window, number)
            if window.learning_rate is not None and window.step <= self._applied:
                self._note(self._send_step(window))
                window.losses = losses

    def finish(self) -> dict[str, Any]:
        """Tell the server that this client's stream has ended, so that it seals and releases the adapter."""

        def end() -> dict[str, Any]:
            assert self._channel is not None, "connected"
            self._channel.send(TRAIN)
            return self._receive(PROGRESS).metadata

        return self._with_retries(end)
