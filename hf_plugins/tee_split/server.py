"""The tail's server: proves what it is, takes encrypted hidden states, trains with a stock Trainer, releases
the adapter."""

import logging
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import AutoConfig, Trainer, TrainingArguments, set_seed

from hf_plugins.tee_split.ahead import ahead
from hf_plugins.tee_split.attestation import SIMULATED, AttestationError, Provider, provider
from hf_plugins.tee_split.batches import check_samples, collate, part_samples
from hf_plugins.tee_split.callback import ReportProgress, SealCheckpoints
from hf_plugins.tee_split.channel import Channel, ChannelClosed, Message, receive_clear, send_clear
from hf_plugins.tee_split.config import SPFConfig, TailConfig
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
from hf_plugins.tee_split.model import load_half, model_digest
from hf_plugins.tee_split.peft import apply_spf, attach_adapter, save_tail, spf_layers
from hf_plugins.tee_split.sealing import SealError
from hf_plugins.tee_split.storage import (
    SealedDataset,
    SealedStore,
    ShardShelf,
    folder_tensors,
    read_json,
    read_sealing_key,
    remove_folder,
    write_folder,
)
from hf_plugins.tee_split.tensors import MessageError
from hf_plugins.tee_split.trainer import TailEngine
from hf_plugins.tee_split.transcript import (
    Credential,
    ServerHandshake,
    check_client_finished,
    server_finished,
)

logger = logging.getLogger(__name__)
MAX_CONNECTIONS = 64
HANDSHAKE_SECONDS = 10.0
READ_AHEAD = 2
MAX_TOKENS = 2**20
TERM_ARGUMENTS = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "optim",
)


def read_clients(path: str | Path) -> dict[str, Credential]:
    """The allow-list of clients.

    Args:
        path: JSON: name -> ``{"public_key": hex}`` (Ed25519) or ``{"psk_file": path}``.

    Raises:
        ValueError: If it names nobody, or an entry is neither of the two.
    """
    found = {}
    for name, entry in read_json(path).items():
        if set(entry) == {"public_key"} and len(entry["public_key"]) == 64 and name.isalnum():
            found[name] = Credential(public_key=bytes.fromhex(entry["public_key"]))
        elif set(entry) == {"psk_file"} and name.isalnum():
            found[name] = Credential(psk=Path(entry["psk_file"]).read_bytes())
        else:
            raise ValueError(
                f"client {name!r} in {path}: letters and digits in the name, and public_key (64 hex digits) "
                "or psk_file"
            )
    if not found:
        raise ValueError(f"{path} names no client; without a list anybody could train the model")
    return found


class TailServer:
    """One enclave's server for one model and one training.

    Args:
        config: Options.
        spf: Options of SPF; ratio 0 turns it off.
        arguments: Of the stock Trainer; output folder and saving are taken over by this server.
        clients: Credentials by client name; read from ``config.clients`` by default.
        evidence: Provider of evidence; made from ``config.provider`` by default.

    Raises:
        ValueError: If options do not fit together.
        FileNotFoundError: If there is no sealing key.
    """

    def __init__(
        self,
        config: TailConfig,
        spf: SPFConfig,
        arguments: TrainingArguments,
        *,
        clients: Mapping[str, Credential] | None = None,
        evidence: Provider | None = None,
    ) -> None:
        self.config, self.spf = config, spf
        self.clients = dict(read_clients(config.clients) if clients is None else clients)
        self._check_release()
        self.evidence = evidence or provider(config.provider)
        self.simulated = self.evidence.kind == "sim"
        if self.simulated and not config.allow_simulated:
            raise ValueError("the simulator protects nothing; pass allow_simulated=True if that is meant")
        self.label = SIMULATED if self.simulated else self.evidence.kind
        self.state = PartialState()
        if config.mode != "cache" and self.state.num_processes > 1:
            raise ValueError(
                f"mode={config.mode!r} runs on one process, not {self.state.num_processes}: the client paces "
                "every batch. Use mode='cache' under accelerate launch."
            )
        self._scratch = self._make_scratch()
        self.arguments = self._own_arguments(arguments)
        key = read_sealing_key(config.sealing_key, create=self.simulated and self.state.is_main_process)
        self.store = SealedStore(config.store, key)
        model = AutoConfig.from_pretrained(config.model)
        self._dim, self._vocab = model.hidden_size, model.vocab_size
        self.terms = self._terms()
        self._lock = threading.Lock()
        self._progress: dict[str, Any] = {"state": "waiting"}
        self._ready, self._stop = threading.Event(), threading.Event()
        self._shelves = {name: ShardShelf(self.store, name) for name in sorted(self.clients)}
        self._engine: TailEngine | None = None
        self._finished: set[str] = set()
        self._gone: set[str] = set()
        self._sessions: set[Channel] = set()
        self._listener: socket.socket | None = None
        self.bytes_received = 0
        self.bytes_sent = 0

    def _check_release(self) -> None:
        unknown = sorted(set(self.config.release_to) - set(self.clients))
        if unknown:
            raise ValueError(
                f"release_to names {unknown}, who are no clients; clients are {sorted(self.clients)}"
            )

    def _make_scratch(self) -> Path:
        if self.config.scratch is not None:
            Path(self.config.scratch).mkdir(parents=True, exist_ok=True)
            return Path(self.config.scratch)
        memory = Path("/dev/shm")
        made = [tempfile.mkdtemp(prefix="tee-split-", dir=memory if memory.is_dir() else None)]
        if not memory.is_dir():
            logger.warning(
                "[%s] no /dev/shm: plain checkpoints pass through %s before they are sealed; set scratch to "
                "enclave memory",
                self.label,
                made[0],
            )
        if self.state.num_processes > 1:
            broadcast_object_list(made)
        return Path(made[0])

    def _own_arguments(self, arguments: TrainingArguments) -> TrainingArguments:
        arguments.output_dir = str(self._scratch / "trainer")
        arguments.save_strategy = "steps"
        arguments.save_steps = self.config.seal_steps
        arguments.save_total_limit = None
        arguments.remove_unused_columns = False
        arguments.report_to = []
        return arguments

    def _terms(self) -> dict[str, Any]:
        given = self.arguments.to_dict()
        return {
            **self.config.terms(),
            "model": model_digest(self.config.model),
            "max_frame": self.config.max_frame_mb * 2**20,
            "adapter": self.config.adapter,
            "spf": self.spf.ratio,
            "release_to": sorted(self.config.release_to or self.clients),
            "training": {name: str(given[name]) for name in TERM_ARGUMENTS},
        }

    # ---- life of the server ----

    def listen(self) -> int:
        """Open the port.

        Returns:
            Its number, chosen by the system if the options say 0.
        """
        self._listener = socket.create_server((self.config.host, self.config.port), backlog=MAX_CONNECTIONS)
        # Closing a socket does not wake a thread that waits in accept().
        self._listener.settimeout(0.2)
        port = self._listener.getsockname()[1]
        logger.info("[%s] listening on %s:%d", self.label, self.config.host, port)
        return port

    def serve(self, on_listening: Callable[[int], None] | None = None) -> Path | None:
        """Serve until training has ended and the clients have left, or `stop` is called.

        Under ``accelerate launch`` every rank calls this; rank 0 owns the socket.

        Args:
            on_listening: Called with the port once it is open.

        Returns:
            Folder of the trained adapter in enclave memory, on rank 0 after a training; else None.
        """
        acceptor: threading.Thread | None = None
        if self.config.mode != "cache":
            self._engine = self._make_engine()
        if self.state.is_main_process:
            if self._listener is None:
                self.listen()
            assert self._listener is not None, "listen() sets it"
            if on_listening is not None:
                on_listening(self._listener.getsockname()[1])
            acceptor = threading.Thread(target=self._accept, name="tee-split accept", daemon=True)
            acceptor.start()
        try:
            return self._train_when_ready() if self.config.mode == "cache" else self._wait_for_clients()
        finally:
            self.stop()
            if acceptor is not None:
                acceptor.join(timeout=5)

    def _train_when_ready(self) -> Path | None:
        self._note_if_ready()
        if self.state.is_main_process:
            while not self._ready.wait(0.2):
                if self._stop.is_set():
                    return None
        self.state.wait_for_everyone()
        folder = self._train()
        self._linger()
        return folder if self.state.is_main_process else None

    def _wait_for_clients(self) -> Path | None:
        while not self._stop.is_set() and not self._finished >= set(self.clients):
            time.sleep(0.05)
        self._linger()
        return self._scratch / "adapter" if (self._scratch / "adapter").is_dir() else None

    def _all_gone(self) -> bool:
        with self._lock:
            return self._gone >= set(self.clients)

    def _linger(self) -> None:
        until = time.monotonic() + self.config.linger
        while self.state.is_main_process and time.monotonic() < until:
            if self._stop.is_set() or self._all_gone():
                return
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop accepting and end all sessions."""
        self._stop.set()
        if self._listener is not None:
            self._listener.close()
        with self._lock:
            sessions = list(self._sessions)
        for channel in sessions:
            channel.close()

    def cleanup(self) -> None:
        """Remove the plaintext in enclave memory."""
        for folder in (self._scratch / "trainer", self._scratch / "adapter"):
            if folder.is_dir():
                remove_folder(folder)
        if self.config.scratch is None and self._scratch.is_dir():
            self._scratch.rmdir()

    def _report(self, **progress: Any) -> None:
        with self._lock:
            self._progress.update(progress)

    def _note_if_ready(self) -> None:
        if all(shelf.complete for shelf in self._shelves.values()):
            self._ready.set()

    # ---- training ----

    def _tail(self) -> tuple[Any, int]:
        set_seed(self.arguments.seed)
        dtype = getattr(torch, self.config.dtype)
        half = load_half(self.config.model, self.config.cut, "server", dtype=dtype)
        model = attach_adapter(half.model, self.config)
        apply_spf(model, self.spf)
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        if not trainable:
            raise ValueError("nothing learns: adapter='none' and ratio=0. Turn one of them on.")
        logger.info(
            "[%s] tail loaded: %d bytes read, %d parameters learn", self.label, half.bytes_read, trainable
        )
        return model, trainable

    def _train(self) -> Path:
        model, trainable = self._tail()
        self._report(state="training", trainable=trainable)
        dataset = SealedDataset([self._shelves[name] for name in sorted(self._shelves)])
        trainer = Trainer(
            model=model,
            args=self.arguments,
            train_dataset=dataset,
            data_collator=collate,
            callbacks=[
                SealCheckpoints(self.store, self.label),
                ReportProgress(self._report, provider=self.evidence.kind, hardware=not self.simulated),
            ],
        )
        if "adapter" not in self.store:
            trainer.train(resume_from_checkpoint=self._restore_checkpoint(model))
            if self.state.is_main_process:
                self._keep_adapter(model)
        self.state.wait_for_everyone()
        self._report(state="done")
        return self._scratch / "adapter"

    def _restore_checkpoint(self, model: Any) -> str | None:
        """Unseal the last checkpoint into enclave memory; its path, or None if there is none."""
        if "checkpoint" not in self.store:
            return None
        metadata, tensors = self.store.read("checkpoint")
        folder = Path(self.arguments.output_dir) / f"checkpoint-{metadata['step']}"
        if self.state.is_main_process:
            files = {k.removeprefix("files/"): v for k, v in tensors.items() if k.startswith("files/")}
            write_folder(files, folder)
        self.state.wait_for_everyone()
        restore_spf(model, {k.removeprefix("spf/"): v for k, v in tensors.items() if k.startswith("spf/")})
        logger.info("[%s] going on from sealed step %d", self.label, metadata["step"])
        return str(folder)

    def _keep_adapter(self, model: Any) -> None:
        folder = self._scratch / "adapter"
        save_tail(model, folder, self.spf, simulated=self.simulated)
        self.store.write("adapter", {"label": self.label}, folder_tensors(folder))

    def _make_engine(self) -> TailEngine:
        model, trainable = self._tail()
        self._report(state="training", trainable=trainable)
        return TailEngine(
            model,
            self.arguments,
            store=self.store,
            seal_steps=self.config.seal_steps,
            return_gradient=self.config.mode == "bidirectional",
            label=self.label,
            bound_seconds=self.config.request_timeout,
        )

    # ---- sessions ----

    def _accept(self) -> None:
        assert self._listener is not None, "serve() opens it"
        places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        with ThreadPoolExecutor(
            max_workers=MAX_CONNECTIONS, thread_name_prefix="tee-split-session"
        ) as sessions:
            while not self._stop.is_set():
                try:
                    stream, address = self._listener.accept()
                except TimeoutError:
                    continue
                except OSError:
                    return
                stream.setblocking(True)
                stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if not places.acquire(blocking=False):
                    # More would wait in a queue that a stranger can fill.
                    logger.warning(
                        "[%s] %d connections are open; %s is turned away",
                        self.label,
                        MAX_CONNECTIONS,
                        address,
                    )
                    stream.close()
                    continue
                done = sessions.submit(self._session, stream, address)
                done.add_done_callback(lambda future: self._note_end(future, places))

    def _note_end(self, session: Future, places: threading.BoundedSemaphore) -> None:
        places.release()
        if session.exception() is not None:
            logger.error("[%s] a session failed", self.label, exc_info=session.exception())

    def _session(self, stream: socket.socket, address: Any) -> None:
        """One connection, from HELLO to its end; whatever goes wrong ends it and nothing else."""
        client, channel = None, None
        try:
            with stream:
                client, channel = self._handshake(stream)
                with self._lock:
                    self._gone.discard(client)
                    self._sessions.add(channel)
                logger.info("[%s] %s connected from %s", self.label, client, address)
                self._answer_all(client, channel)
        except (FrameError, ChannelClosed, AttestationError) as error:
            # The peer is told nothing; what it did wrong stands in our log alone.
            logger.warning("[%s] connection from %s (%s) ended: %s", self.label, address, client, error)
        finally:
            if channel is not None:
                with self._lock:
                    self._sessions.discard(channel)
                    self.bytes_received += channel.bytes_received
                    self.bytes_sent += channel.bytes_sent
                if self._engine is not None and client is not None:
                    self._engine.drop(client, session=channel.session)

    def _handshake(self, stream: socket.socket) -> tuple[str, Channel]:
        handshake = ServerHandshake(receive_clear(stream, HELLO, timeout=HANDSHAKE_SECONDS))
        body = self.evidence.evidence(handshake.report_data(self.terms))
        reply, keys = handshake.answer(self.evidence.kind, body, self.terms)
        send_clear(stream, EVIDENCE, reply, timeout=HANDSHAKE_SECONDS)
        # Until the client has proved who it is, it may not make this side keep more than a handshake.
        channel = Channel(
            stream,
            keys,
            client=False,
            max_receive=64 * 1024,
            max_send=handshake.max_frame,
            timeout=HANDSHAKE_SECONDS,
            bucket=self.config.frame_bucket,
        )
        kind, raw = channel.receive_bytes(timeout=HANDSHAKE_SECONDS)
        if kind != FINISHED:
            raise FrameError("the client sent data before FINISHED")
        client = check_client_finished(bytes(raw), keys, self.clients)
        channel.send_bytes(FINISHED, [memoryview(server_finished(keys))])
        channel.max_receive = self.config.max_frame_mb * 2**20
        channel.timeout = self.config.request_timeout
        return client, channel

    def _answer_all(self, client: str, channel: Channel) -> None:
        for message in ahead(self._messages(channel), READ_AHEAD):
            if isinstance(message, MessageError):
                channel.send(ERROR, {"code": "bad_request", "reason": str(message)})
                continue
            try:
                if not self._answer(client, channel, message):
                    return
            except MessageError as error:
                logger.warning("[%s] %s sent a bad request: %s", self.label, client, error)
                channel.send(ERROR, {"code": "bad_request", "reason": str(error)})

    def _messages(self, channel: Channel) -> Iterator[Message | MessageError]:
        while True:
            try:
                message = channel.receive(timeout=self.config.request_timeout)
            except MessageError as error:
                yield error
                continue
            yield message
            if message.kind == BYE:
                return

    def _answer(self, client: str, channel: Channel, message: Message) -> bool:
        """Answer one message; False ends the session."""
        answers: dict[int, Callable[[], None]] = {
            RESUME: lambda: channel.send(RESUME, self._standing(client)),
            DATA: lambda: self._data(client, channel, message),
            STEP: lambda: self._step(client, channel, message),
            TRAIN: lambda: self._end_of_data(client, channel, message),
            HEARTBEAT: lambda: channel.send(PROGRESS, self._snapshot()),
            FETCH: lambda: self._release(client, channel),
        }
        if message.kind == BYE:
            self._let_go(client)
            return False
        if message.kind not in answers:
            raise MessageError("a message of this type is not for a server")
        answers[message.kind]()
        return True

    def _let_go(self, client: str) -> None:
        """Note that the server need not wait for a client: all is done, and it has said goodbye."""
        with self._lock:
            if self._progress["state"] == "done" and (self._engine is None or client in self._finished):
                self._gone.add(client)

    def _snapshot(self) -> dict[str, Any]:
        with self._lock:
            return {"label": self.label, **self._progress}

    def _standing(self, client: str) -> dict[str, Any]:
        """Where this client stands, for one that comes back."""
        shelf = self._shelves[client]
        standing = {"client": client, "shards": shelf.count, "complete": shelf.complete, **self._snapshot()}
        if self._engine is not None:
            standing |= self._engine.standing(client)
        return standing

    def _checked(self, tensors: Mapping[str, Tensor]) -> None:
        dtype = getattr(torch, self.config.dtype)
        check_samples(tensors, dim=self._dim, dtype=dtype, max_tokens=MAX_TOKENS, vocab_size=self._vocab)

    def _data(self, client: str, channel: Channel, message: Message) -> None:
        self._checked(message.tensors)
        if self._engine is None:
            self._shelves[client].add(_number(message.metadata, "shard"), message.tensors)
            channel.send(ACK, {"shards": self._shelves[client].count})
            return
        loss, gradient = self._engine.micro(
            client,
            session=channel.session,
            step=_number(message.metadata, "step"),
            micro=_number(message.metadata, "micro"),
            num_items=_number(message.metadata, "num_items"),
            samples=part_samples(message.tensors),
        )
        reply = {"step": message.metadata["step"], "micro": message.metadata["micro"], "loss": loss}
        channel.send(RESULT, reply, {} if gradient is None else {"gradient": gradient})

    def _step(self, client: str, channel: Channel, message: Message) -> None:
        if self._engine is None:
            raise MessageError("the server trains by itself in cache mode; there is no STEP")
        rate = message.metadata.get("learning_rate")
        if not isinstance(rate, (int, float)) or not 0 <= rate < 1e3:
            raise MessageError("learning_rate must be a number from 0")
        reply = self._engine.step(
            client, session=channel.session, step=_number(message.metadata, "step"), learning_rate=float(rate)
        )
        self._report(step=reply["applied"])
        channel.send(ACK, reply)

    def _end_of_data(self, client: str, channel: Channel, message: Message) -> None:
        if self._engine is None:
            shelf = self._shelves[client]
            if not shelf.complete:
                shelf.finish(_number(message.metadata, "num_shards"))
            self._note_if_ready()
        else:
            with self._engine.lock:
                self._engine.seal()
                self._keep_adapter(self._engine.model)
            self._report(state="done")
            with self._lock:
                self._finished.add(client)
        channel.send(PROGRESS, self._snapshot())

    def _release(self, client: str, channel: Channel) -> None:
        if self.config.release_to and client not in self.config.release_to:
            channel.send(
                ERROR, {"code": "not_released", "reason": "the adapter is not released to this client"}
            )
        elif "adapter" not in self.store or self._snapshot()["state"] != "done":
            channel.send(ERROR, {"code": "not_ready", "reason": "training has not ended"})
        else:
            metadata, tensors = self.store.read("adapter")
            channel.send(ADAPTER, metadata, tensors)


def _number(metadata: Mapping[str, Any], name: str) -> int:
    value = metadata.get(name)
    if type(value) is not int or not 0 <= value < 2**48:
        raise MessageError(f"{name} must be a whole number from 0")
    return value


def restore_spf(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Put differences of a sealed checkpoint back.

    Raises:
        SealError: If the checkpoint belongs to other SPF options.
    """
    layers = spf_layers(model)
    if {name.rsplit(".", 1)[0] for name in tensors} != set(layers):
        raise SealError(
            "the sealed checkpoint was made with other SPF options; use an empty store for a new run"
        )
    for name, layer in layers.items():
        if not torch.equal(layer.spf_rows.cpu(), tensors[f"{name}.spf_rows"]):
            raise SealError(
                "the sealed checkpoint was made with other SPF options; use an empty store for a new run"
            )
        with torch.no_grad():
            layer.spf_delta.copy_(tensors[f"{name}.spf_delta"])
