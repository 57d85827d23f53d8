"""Both ends over TCP: the three modes agree, nothing readable crosses, bad peers get nothing, killed servers
change nothing."""

import copy
import multiprocessing
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from hf_plugins.tee_split import client as room
from hf_plugins.tee_split.attestation import AttestationError, Policy, SimProvider
from hf_plugins.tee_split.batches import Sample, join_samples
from hf_plugins.tee_split.channel import ChannelClosed, receive_clear, send_clear
from hf_plugins.tee_split.client import (
    RollbackError,
    ServerRefusedError,
    SplitClient,
    policy_of,
    read_identity,
)
from hf_plugins.tee_split.config import SPFConfig
from hf_plugins.tee_split.frames import (
    DATA,
    EVIDENCE,
    FINISHED,
    HEARTBEAT,
    HELLO,
    RESUME,
    STEP,
    TRAIN,
    FrameError,
    sealed_bytes,
)
from hf_plugins.tee_split.model import hidden_states, model_digest, split_model
from hf_plugins.tee_split.peft import load_spf
from hf_plugins.tee_split.server import TailServer
from hf_plugins.tee_split.tensors import pack, raw_view
from hf_plugins.tee_split.trainer import SplitTrainer
from hf_plugins.tee_split.transcript import (
    Credential,
    HandshakeError,
    Identity,
    ServerHandshake,
    server_finished,
)
from tests.hf_plugins.tee_split.tiny import (
    PSK,
    Proxy,
    arguments,
    client_config,
    free_port,
    make_client,
    rows,
    running,
    saved_model,
    tail_config,
    tiny_model,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    saved_model(folder)
    return folder


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(room, "LAST_PAUSE", 0.4)


def drive(client: SplitClient, folder: Path, *, data: list | None = None) -> dict[str, torch.Tensor]:
    """Train in the client's mode and fetch; all trained tensors by name."""
    with client:
        if client.config.mode == "cache":
            client.upload(rows() if data is None else data)
            client.train()
        else:
            local = arguments(max_grad_norm=0.0)
            SplitTrainer(client, local, train_dataset=rows() if data is None else data).train()
            client.finish()
        client.fetch(folder)
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What an undisturbed cache run ends with."""
    folder = tmp_path_factory.mktemp("expected")
    with running(tail_config(model, folder), spf=0.5) as (_, port):
        return drive(make_client(model, port), folder / "adapter")


# ---- modes ----


@pytest.mark.host
def test_cache_equals_stream_and_sends_once(model: Path, tmp_path: Path, expected: dict) -> None:
    """Two epochs: the stream sends every sample twice, the cache once; the weights are equal bit by bit."""
    sent = {}
    for mode in ("stream", "cache"):
        options = {"mode": mode}
        with running(tail_config(model, tmp_path / mode, **options), spf=0.5) as (_, port):
            client = make_client(model, port, frame_bucket=0, **options)
            assert equal(drive(client, tmp_path / mode / "adapter"), expected)
            sent[mode] = client.bytes_sent
    hidden = sum(len(row["input_ids"]) for row in rows()) * (32 * 4 + 4)
    assert hidden < sent["cache"] < hidden + 6000
    assert sent["stream"] > 2 * hidden


@pytest.mark.host
def test_fetched_adapter_gives_the_unsplit_model_the_split_models_logits(model: Path, tmp_path: Path) -> None:
    with running(tail_config(model, tmp_path), spf=0.5) as (server, port):
        drive(make_client(model, port), tmp_path / "adapter")
        whole = tiny_model()
        client = split_model(copy.deepcopy(whole), 2, "client")
        tail = PeftModel.from_pretrained(
            split_model(copy.deepcopy(whole), 2, "server"), tmp_path / "adapter"
        ).eval()
        load_spf(tail, tmp_path / "adapter")
        portable = PeftModel.from_pretrained(whole, tmp_path / "adapter").eval()
        load_spf(portable, tmp_path / "adapter")
        ids = torch.arange(3, 20)[None]
        hidden = hidden_states(client, ids, torch.ones_like(ids))
        assert torch.equal(portable(input_ids=ids).logits, tail(inputs_embeds=hidden).logits)
        assert server.label in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.host
def test_bidirectional_training_equals_the_unsplit_model(model: Path, tmp_path: Path) -> None:
    """LoRA on all four layers: two on the client, two on the server, against one plain Trainer."""
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["self_attn.o_proj"], "task_type": "CAUSAL_LM"}
    data = [{"input_ids": row["input_ids"][:5], "labels": row["input_ids"][:5]} for row in rows()]
    torch.manual_seed(11)
    whole = get_peft_model(tiny_model(), LoraConfig(**lora))
    start = {name: value.clone() for name, value in whole.state_dict().items() if "lora" in name}
    from transformers import Trainer

    from hf_plugins.tee_split.trainer import pad_token_batch

    plain = Trainer(
        model=whole, args=arguments(max_grad_norm=0.0), train_dataset=data, data_collator=pad_token_batch
    )
    plain.train()
    front = get_peft_model(
        split_model(tiny_model(), 2, "client"), LoraConfig(**lora, layers_to_transform=[0, 1])
    )
    front.load_state_dict({name: start[name] for name in front.state_dict() if name in start}, strict=False)
    options = {"mode": "bidirectional"}
    config = tail_config(model, tmp_path, lora_r=4, lora_alpha=8, **options)
    with running(config, max_grad_norm=0.0) as (server, port):
        with torch.no_grad():
            for name, parameter in server._engine.model.named_parameters():
                if "lora" in name:
                    parameter.copy_(start[name])
        with make_client(model, port, **options) as client:
            SplitTrainer(
                client, arguments(max_grad_norm=0.0), train_dataset=data, front=front.get_base_model()
            ).train()
            client.finish()
            client.fetch(tmp_path / "adapter")
    end = {name: value for name, value in whole.state_dict().items() if "lora" in name}
    tail = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    found = {name: value for name, value in front.state_dict().items() if "lora" in name}
    found |= {name.replace(".weight", ".default.weight"): value for name, value in tail.items()}
    assert found.keys() == end.keys()
    for name, value in end.items():
        assert not torch.equal(value, start[name]), name
        torch.testing.assert_close(found[name], value, atol=2e-6, rtol=1e-4)


@pytest.mark.host
def test_several_clients_train_one_tail(model: Path, tmp_path: Path) -> None:
    """Alice's samples and Bob's: as one client that has all of them; only Bob may fetch."""
    data = rows(16)
    with running(tail_config(model, tmp_path / "one"), spf=0.5) as (_, port):
        alone = drive(make_client(model, port), tmp_path / "alone", data=data)
    config = tail_config(model, tmp_path / "two", release_to=["bob"])
    with running(config, spf=0.5, names=("alice", "bob")) as (server, port):
        with make_client(model, port, name="bob") as bob, make_client(model, port) as alice:
            bob.upload(data[8:])
            assert bob._ask_progress()["state"] == "waiting"
            alice.upload(data[:8])
            alice.train()
            with pytest.raises(ServerRefusedError, match="the server refused: .*not_released"):
                alice.fetch(tmp_path / "no")
            bob.fetch(tmp_path / "together")
        assert server.terms["release_to"] == ["bob"]
    together = {
        n: t for p in sorted((tmp_path / "together").glob("*.safetensors")) for n, t in load_file(p).items()
    }
    assert equal(alone, together)


@pytest.mark.host
def test_prefix_on_the_tail(model: Path, tmp_path: Path) -> None:
    config = tail_config(model, tmp_path, adapter="prefix", num_virtual_tokens=4)
    with running(config) as (_, port):
        found = drive(make_client(model, port), tmp_path / "adapter")
    assert found["prefix"].shape == (4, 2, 32)


@pytest.mark.host
def test_overlap_changes_no_byte(model: Path, tmp_path: Path, expected: dict) -> None:
    for mode in ("cache", "stream"):
        with running(tail_config(model, tmp_path / mode, mode=mode), spf=0.5) as (_, port):
            assert equal(drive(make_client(model, port, mode=mode, ahead=0), tmp_path / mode / "a"), expected)


# ---- what crosses the wire ----


@pytest.mark.host
@pytest.mark.parametrize("mode", ["cache", "stream"])
def test_no_window_of_the_data_is_on_the_wire_or_on_the_disk(model: Path, tmp_path: Path, mode: str) -> None:
    with running(tail_config(model, tmp_path, mode=mode), spf=0.5) as (_, port):
        proxy = Proxy(lambda: port)
        client = make_client(model, proxy.port, mode=mode)
        samples = client.encode(rows())
        trained = drive(client, tmp_path / "adapter")
        proxy.close()
    wire = bytes(proxy.seen["up"]) + bytes(proxy.seen["down"])
    disk = b"".join(path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file())
    secrets = [raw_view(sample.hidden_TD) for sample in samples]
    secrets += [raw_view(torch.cat([sample.labels_T for sample in samples])), PSK]
    secrets += [raw_view(tensor.contiguous()) for tensor in trained.values()]
    windows = {
        bytes(secret[at : at + 16])
        for secret in secrets
        for at in range(0, len(secret) - 15, 4)
        # Small numbers and zeros occur in headers and padding too; a window must say something.
        if sum(map(bool, secret[at : at + 16])) >= 4
    }
    assert len(windows) > 1000
    assert len(wire) > 20_000
    for text in (wire, disk):
        assert not windows & {text[at : at + 16] for at in range(len(text) - 15)}


@pytest.mark.host
def test_what_crosses_the_wire_names_no_token(model: Path, tmp_path: Path) -> None:
    """Nearest-row matching reads every token from plain hidden states, and none above chance from the wire.

    The attack knows the public front half: it encodes each vocabulary entry alone and takes the nearest row.
    The first token of every sample then matches exactly, which shows that the attack works. 97 tokens: on
    noise each guess is right with probability 1/97; 12 x 4 guesses give more than 6 hits with probability
    below 1e-6.
    """
    with running(tail_config(model, tmp_path)) as (_, port):
        proxy = Proxy(lambda: port)
        client = make_client(model, proxy.port, frame_bucket=0)
        front = client.front
        drive(client, tmp_path / "adapter")
        proxy.close()
    vocabulary = torch.arange(97)[:, None]
    table = hidden_states(front, vocabulary, torch.ones_like(vocabulary))[:, 0]
    truth = torch.tensor([row["input_ids"][0] for row in rows()])
    plain = torch.stack([sample.hidden_TD[0] for sample in client.encode(rows())])

    def guess(found: torch.Tensor) -> torch.Tensor:
        return torch.cdist(
            torch.nan_to_num(found.double(), 0.0, 0.0, 0.0).clamp(-1e6, 1e6), table.double()
        ).argmin(1)

    assert (guess(plain) == truth).all()
    # The longest frame's bytes, read as fp32 at four offsets.
    wire, hits = bytes(proxy.seen["up"]), 0
    for offset in range(4):
        raw = wire[-12 * 128 - offset - 64 :][: 12 * 128]
        hits += int(
            (guess(torch.frombuffer(bytearray(raw), dtype=torch.float32).view(12, 32)) == truth).sum()
        )
    assert hits <= 6


def test_bytes_per_token_meet_the_floor() -> None:
    """bf16, d=4096, 512 tokens: 2d bytes a token, 4 of label, and frame, header and tags below 0.1 % in
    all."""
    sample = Sample(torch.zeros(512, 4096, dtype=torch.bfloat16), torch.zeros(512, dtype=torch.int32))
    parts = pack({"shard": 0}, join_samples([sample]), bucket=0)
    wire = sealed_bytes(sum(part.nbytes for part in parts))
    assert 1.0 <= wire / (2 * 4096 * 512) < 1.001
    padded = sealed_bytes(
        sum(part.nbytes for part in pack({"shard": 0}, join_samples([sample]), bucket=4096))
    )
    assert padded / (2 * 4096 * 512) < 1.0016


# ---- bad peers, seen from the client ----


class BadServer:
    """Answers one HELLO as told, then listens: nothing may come."""

    def __init__(self, answer: Callable[[bytes], bytes], *, kind: int = EVIDENCE) -> None:
        self.answer, self.kind = answer, kind
        self.after = bytearray()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        stream, _ = self._listener.accept()
        with stream:
            reply = self.answer(receive_clear(stream, HELLO, timeout=5))
            send_clear(stream, self.kind, reply, timeout=5)
            stream.settimeout(5)
            try:
                while piece := stream.recv(4096):
                    self.after += piece
            except OSError:
                return

    def finish(self) -> bytes:
        self.thread.join(timeout=10)
        self._listener.close()
        return bytes(self.after)


def _terms(model: Path) -> dict[str, Any]:
    return {"cut": 2, "dtype": "float32", "mode": "cache", "model": model_digest(model), "max_frame": 2**20}


def _evidence(
    model: Path, change: Callable[[bytes], bytes] = bytes, kind: str = "sim", **terms: Any
) -> Callable[[bytes], bytes]:
    def answer(hello: bytes) -> bytes:
        handshake, full = ServerHandshake(hello), {**_terms(model), **terms}
        return handshake.answer(kind, SimProvider().evidence(change(handshake.report_data(full))), full)[0]

    return answer


@pytest.mark.parametrize(
    ("case", "error", "words"),
    [
        ("simulated", AttestationError, "evidence of kind 'sim' is not accepted"),
        ("other handshake", AttestationError, "made for another handshake"),
        ("other simulator", AttestationError, "signed by another simulator"),
        ("other terms", FrameError, "works under other terms"),
        ("no bound", FrameError, "the server's terms name no max_frame"),
        ("not json", FrameError, "EVIDENCE is no JSON"),
        ("wrong frame", FrameError, "of the handshake was due"),
    ],
)
def test_nothing_is_sent_to_a_server_that_does_not_prove_itself(
    model: Path, case: str, error: type[Exception], words: str
) -> None:
    changes: dict[str, Any] = {}
    answer, kind = _evidence(model), EVIDENCE
    if case == "simulated":
        changes = {"tees": ["sgx", "tdx"], "allow_simulated": False}
    elif case == "other handshake":
        answer = _evidence(model, lambda data: bytes(64))
    elif case == "other simulator":
        changes = {"simulator_key": "00" * 32}
    elif case == "other terms":
        answer = _evidence(model, cut=3)
    elif case == "no bound":
        answer = _evidence(model, max_frame=0)
    elif case == "not json":
        answer = lambda hello: b"{"  # noqa: E731
    else:
        kind = HELLO
    bad = BadServer(answer, kind=kind)
    client = make_client(model, bad.port, **changes)
    with pytest.raises(error, match=words):
        client.upload(rows())
    client.close()
    assert bad.finish() == b""


def test_quote_of_a_replayed_handshake_is_refused_before_any_payload(model: Path) -> None:
    """A real SGX quote: authentic, but its report data are another handshake's."""
    pytest.importorskip("dcap_qvl", reason="quotes are verified by dcap-qvl")
    data = Path(__file__).parent / "data"

    def answer(hello: bytes) -> bytes:
        return ServerHandshake(hello).answer("sgx", (data / "sgx_quote").read_bytes(), _terms(model))[0]

    bad = BadServer(answer)
    config = client_config(model, bad.port, tees=["sgx"])
    policy = Policy(
        kinds=("sgx",), collateral=(data / "sgx_quote_collateral.json").read_text(), now=1750500000,
        tcb_statuses=("ConfigurationAndSWHardeningNeeded",),
    )  # fmt: skip
    client = SplitClient(config, identity=Identity("alice", psk=PSK), policy=policy)
    with pytest.raises(AttestationError, match="made for another handshake"):
        client.upload(rows())
    assert bad.finish() == b""


def test_retries_are_finite(model: Path) -> None:
    client = make_client(model, free_port(), num_retries=3)
    start = time.monotonic()
    with pytest.raises(ChannelClosed, match="gave up after .*3 attempts to reach"):
        client.upload(rows())
    assert 0.3 < time.monotonic() - start < 10


def test_empty_upload_is_refused(model: Path) -> None:
    with pytest.raises(ValueError, match="there are no samples to upload"):
        make_client(model, 1).upload([])


def test_options_become_policy_and_identity(model: Path, tmp_path: Path) -> None:
    config = client_config(
        model,
        1,
        tees=["tdx"],
        measurements=["mr_td=aa", "mr_td=bb", "rt_mr0=cc"],
        simulator_key="ab",
        key_file=str(tmp_path / "k"),
    )
    policy = policy_of(config)
    assert policy.measurements == {"mr_td": ("aa", "bb"), "rt_mr0": ("cc",)}
    assert policy.simulator_key == b"\xab"
    (tmp_path / "k").write_bytes(bytes(32))
    assert read_identity(config).psk == bytes(32)
    pem = [
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        for key in (Ed25519PrivateKey.generate(), X25519PrivateKey.generate())
    ]
    (tmp_path / "k").write_bytes(pem[0])
    assert read_identity(config).signing_key is not None
    (tmp_path / "k").write_bytes(pem[1])
    with pytest.raises(ValueError, match="holds no Ed25519 key"):
        read_identity(config)


def test_store_that_was_set_back_is_noticed(model: Path) -> None:
    client = make_client(model, 1, mode="stream")
    client._check_standing({"applied": 4, "durable": 4})
    with pytest.raises(RollbackError, match="its store was set back"):
        client._check_standing({"applied": 2, "durable": 2})


# ---- bad peers, seen from the server ----


def hand_made(model: Path, port: int) -> SplitClient:
    client = make_client(model, port)
    client.connect()
    return client


@pytest.mark.host
def test_bad_requests_are_answered_and_not_applied(model: Path, tmp_path: Path) -> None:
    good = join_samples([Sample(torch.zeros(3, 32), torch.ones(3, dtype=torch.int32))])
    bad = [
        ({"shard": 0}, {**good, "hidden": torch.full((3, 32), float("nan"))}),
        ({"shard": 0}, {**good, "hidden": torch.zeros(3, 31)}),
        ({"shard": 0}, {**good, "hidden": torch.zeros(3, 32, dtype=torch.bfloat16)}),
        ({"shard": 0}, {**good, "labels": torch.full((3,), 97, dtype=torch.int32)}),
        ({"shard": 5}, good),
        ({"shard": "0"}, good),
        ({}, good),
        ({"shard": 0}, {}),
    ]
    with running(tail_config(model, tmp_path)) as (server, port):
        client = hand_made(model, port)
        channel = client._channel
        for metadata, tensors in bad:
            channel.send(DATA, metadata, tensors)
            with pytest.raises(ServerRefusedError, match="bad_request"):
                client._receive(DATA)
        for kind in (STEP, FINISHED):
            channel.send(kind, {"step": 1, "learning_rate": 1.0})
            with pytest.raises(ServerRefusedError, match="there is no STEP|not for a server"):
                client._receive(DATA)
        channel.send(TRAIN, {"num_shards": 0})
        with pytest.raises(ServerRefusedError, match="the client counts .*0 shards"):
            client._receive(DATA)
        channel.send(room.FETCH)
        with pytest.raises(ServerRefusedError, match="not_ready"):
            client._receive(DATA)
        channel.send_bytes(HEARTBEAT, [memoryview(b"nonsense that is long")])
        with pytest.raises(ServerRefusedError, match="bad_request"):
            client._receive(DATA)
        assert server._shelves["alice"].count == 0
        # The session is still a good one.
        assert client._ask_progress()["state"] == "waiting"
        channel.send(RESUME)
        with pytest.raises(FrameError, match="came where"):
            client._receive(DATA)
        client.close()


@pytest.mark.host
def test_stream_requests_out_of_order_are_refused(model: Path, tmp_path: Path) -> None:
    good = join_samples([Sample(torch.zeros(3, 32), torch.ones(3, dtype=torch.int32))])
    with running(tail_config(model, tmp_path, mode="stream")) as (_, port):
        client = make_client(model, port, mode="stream")
        client.connect()
        for rate in (None, -1.0, 1e9, "x"):
            client._channel.send(STEP, {"step": 1, "learning_rate": rate})
            with pytest.raises(ServerRefusedError, match="learning_rate must be a number from 0"):
                client._receive(DATA)
        for step, micro, items in ((2, 0, 2), (1, 1, 2), (1, 0, 0)):
            client._channel.send(DATA, {"step": step, "micro": micro, "num_items": items}, good)
            with pytest.raises(ServerRefusedError, match="was due|that is due"):
                client._receive(DATA)
        client.close()


@pytest.mark.host
def test_strangers_get_nothing(model: Path, tmp_path: Path) -> None:
    """Unknown client, wrong key, garbage, a frame before FINISHED: closed without a word; a good client still
    works."""
    with running(tail_config(model, tmp_path)) as (server, port):
        for client in (make_client(model, port, psk=bytes(32)), make_client(model, port, name="mallory")):
            with pytest.raises(ChannelClosed, match="closed the connection|broke while reading"):
                client.connect()
        for raw in (b"GET / HTTP/1.1\r\n\r\n" + bytes(32), bytes(64), b"TEES\x01\x63" + bytes(26)):
            with socket.create_connection(("127.0.0.1", port)) as stream:
                stream.sendall(raw)
                stream.settimeout(5)
                try:
                    assert stream.recv(1) == b""
                except ConnectionResetError:
                    pass
        client = hand_made(model, port)
        assert client._ask_progress()["state"] == "waiting"
        client.close()
        assert server._shelves["alice"].count == 0


@pytest.mark.host
def test_more_connections_than_places_are_turned_away(
    monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
) -> None:
    """One place, taken by a stranger who says nothing: the next one is closed and not kept waiting."""
    monkeypatch.setattr("hf_plugins.tee_split.server.MAX_CONNECTIONS", 1)
    with running(tail_config(model, tmp_path)) as (_, port):
        with socket.create_connection(("127.0.0.1", port)):
            # Connections are accepted in the order in which they came.
            with socket.create_connection(("127.0.0.1", port)) as second:
                second.settimeout(5)
                assert second.recv(1) == b""
        # The place is free again once the stranger has left.
        client = make_client(model, port)
        client._with_retries(client._ask_progress)
        client.close()


@pytest.mark.host
def test_data_before_finished_end_the_session(
    monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A client with good keys that skips its proof gets no answer; only the server's log has the reason."""
    with running(tail_config(model, tmp_path)) as (_, port):
        client = make_client(model, port)
        with monkeypatch.context() as patch:
            patch.setattr(room.Channel, "send_bytes", client_finished_as(RESUME))
            with pytest.raises(ChannelClosed):
                client.connect()
        deadline = time.monotonic() + 5
        while "the client sent data before FINISHED" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.02)
    assert "the client sent data before FINISHED" in caplog.text


def client_finished_as(kind: int) -> Callable[..., None]:
    original = room.Channel.send_bytes

    def send(self: room.Channel, _: int, parts: list[memoryview]) -> None:
        original(self, kind, parts)

    return send


def test_server_that_skips_finished_is_refused(model: Path) -> None:
    """The evidence is good, but the first encrypted answer is something else."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        stream, _ = listener.accept()
        with stream:
            handshake = ServerHandshake(receive_clear(stream, HELLO, timeout=5))
            evidence = SimProvider().evidence(handshake.report_data(_terms(model)))
            reply, keys = handshake.answer("sim", evidence, _terms(model))
            send_clear(stream, EVIDENCE, reply, timeout=5)
            channel = room.Channel(stream, keys, client=False, max_receive=10**5, max_send=10**5, timeout=5)
            channel.receive_bytes(timeout=5)
            channel.send_bytes(RESUME, [memoryview(server_finished(keys))])

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    client = make_client(model, listener.getsockname()[1])
    with pytest.raises(FrameError, match="the server sent data before FINISHED"):
        client.connect()
    thread.join(timeout=5)
    listener.close()


def test_results_of_another_micro_batch_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = make_client(model, 1, mode="stream")
    window = room._Window(step=1, micros=[({}, 1)])
    for answer in ({"step": 2, "micro": 0}, {"step": 1, "micro": 1}):
        message = room.Message(room.RESULT, {**answer, "loss": 1.0}, {})
        monkeypatch.setattr(client, "_receive", lambda kind, message=message: message)
        with pytest.raises(FrameError, match="a result came for another micro-batch"):
            client._collect(window)


def test_absent_server_is_named(model: Path) -> None:
    with pytest.raises(ChannelClosed, match="no server at .*127.0.0.1"):
        make_client(model, free_port()).connect()


@pytest.mark.host
def test_flipped_bits_on_the_wire_change_nothing(model: Path, tmp_path: Path, expected: dict) -> None:
    """A relay flips one bit in each of the first 12 pieces that go up, in turn: every time the connection
    ends, the client comes back, and the weights are those of an undisturbed run."""
    generator, count = random.Random(0), [0]

    def flip(piece: bytes) -> bytes:
        count[0] += 1
        if count[0] % 3 or count[0] > 36:
            return piece
        changed = bytearray(piece)
        changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
        return bytes(changed)

    with running(tail_config(model, tmp_path, request_timeout=1.0), spf=0.5) as (_, port):
        proxy = Proxy(lambda: port, up=flip)
        client = make_client(model, proxy.port, num_retries=40, request_timeout=1.0)
        assert equal(_patient(client, tmp_path / "adapter"), expected)
        proxy.close()
    assert count[0] > 12


def _patient(client: SplitClient, folder: Path) -> dict[str, torch.Tensor]:
    """`drive`, again whenever a changed HELLO or EVIDENCE made one side refuse the other for good."""
    for _ in range(20):
        try:
            client.upload(rows())
            break
        except (HandshakeError, AttestationError):
            client.disconnect()
    return drive(client, folder)


# ---- killed servers ----


def _serve_forked(pipe: Any, options: dict[str, Any], paths: tuple[Path, Path]) -> None:
    torch.set_num_threads(1)
    server = TailServer(
        tail_config(*paths, **options),
        SPFConfig(ratio=0.5),
        arguments(),
        clients={"alice": Credential(psk=PSK)},
    )
    server.serve(on_listening=pipe.send)


class Mortal:
    """A server process that is killed when a chosen message has reached it, and started again on the same
    store."""

    def __init__(self, model: Path, folder: Path, options: dict[str, Any], kills: Iterator[int]) -> None:
        self.paths, self.options, self.kills = (model, folder), options, kills
        self.deaths, self.frames, self.lock = 0, 0, threading.Lock()
        self.next_kill = next(kills, None)
        self.proxy = Proxy(lambda: self.port, up=self._count)
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("fork")
        mine, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve_forked, args=(theirs, self.options, self.paths), daemon=True
        )
        self.process.start()
        assert mine.poll(60), "the server did not start"
        self.port = mine.recv()

    def _count(self, piece: bytes) -> bytes:
        with self.lock:
            self.frames += 1
            if self.next_kill is not None and self.frames >= self.next_kill:
                self.next_kill = next(self.kills, None)
                self.frames = 0
                self.deaths += 1
                os.kill(self.process.pid, signal.SIGKILL)
                self.process.join()
                self.start()
        return piece

    def close(self) -> None:
        self.proxy.close()
        self.process.join(timeout=20)
        if self.process.is_alive():
            self.process.kill()


def kill_run(model: Path, folder: Path, mode: str, kills: list[int]) -> tuple[dict[str, torch.Tensor], int]:
    options = {"mode": mode, "linger": 3.0, "scratch": str(folder / "scratch")}
    mortal = Mortal(model, folder, options, iter(kills))
    try:
        client = make_client(model, mortal.proxy.port, mode=mode, num_retries=30)
        return drive(client, folder / "adapter"), mortal.deaths
    finally:
        mortal.close()


@pytest.mark.host
@pytest.mark.parametrize("mode", ["cache", "stream"])
def test_killed_servers_change_nothing(model: Path, tmp_path: Path, mode: str, expected: dict) -> None:
    """SIGKILL after the 4th, then after the 6th, then after the 9th piece of the new connection."""
    found, deaths = kill_run(model, tmp_path, mode, [4, 6, 9])
    assert deaths == 3
    assert equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["cache", "stream"])
@pytest.mark.parametrize("after", range(1, 16))
def test_server_killed_between_any_two_messages(
    model: Path, tmp_path: Path, mode: str, after: int, expected: dict
) -> None:
    assert equal(kill_run(model, tmp_path, mode, [after])[0], expected)


@pytest.mark.host
def test_client_that_dies_goes_on_where_it_was(model: Path, tmp_path: Path, expected: dict) -> None:
    """The first client leaves without a word after one shard; the second one sends only the rest."""
    with running(tail_config(model, tmp_path), spf=0.5) as (server, port):
        first = hand_made(model, port)
        first._channel.send(DATA, {"shard": 0}, join_samples(first.encode(rows()[:4])))
        first._receive(room.ACK)
        first.disconnect()
        assert server._shelves["alice"].count == 1
        shards: list[tuple[int, int]] = []
        with make_client(model, port) as second:
            second.upload(rows(), report=lambda done, total: shards.append((done, total)))
            second.train()
            second.fetch(tmp_path / "adapter")
        assert shards == [(2, 3), (3, 3)]
    found = {
        n: t for p in sorted((tmp_path / "adapter").glob("*.safetensors")) for n, t in load_file(p).items()
    }
    assert equal(found, expected)
