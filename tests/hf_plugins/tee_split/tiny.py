"""Tiny models of every family, one server and one client on loopback, a proxy between them."""

import os
import queue
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainingArguments

from hf_plugins.tee_split.client import SplitClient
from hf_plugins.tee_split.config import ClientConfig, SPFConfig, TailConfig
from hf_plugins.tee_split.server import TailServer
from hf_plugins.tee_split.transcript import Credential, Identity

NINE = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "glm", "phi3", "gpt2")
PSK = bytes(range(32))
SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "sliding_window": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "n_embd": 32, "n_layer": 4, "n_head": 4,
    "n_positions": 64, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "attention_dropout": 0.0, "hidden_dropout": 0.0,
}  # fmt: skip


def tiny_model(kind: str = "llama", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of four layers in eval mode; weights large enough that every layer matters."""
    torch.manual_seed(seed)
    known = AutoConfig.for_model(kind).to_dict()
    sizes = {name: value for name, value in SIZES.items() if name in known}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    return model


def tokens(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two rows, the second one padded on the right."""
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": torch.arange(9).expand_as(ids),
        "labels": ids.masked_fill(mask == 0, -100),
    }


def rows(count: int = 12, seed: int = 0) -> list[dict[str, list[int]]]:
    """Samples of five to eight tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": torch.randint(3, 97, (5 + i % 4,), generator=generator).tolist()} for i in range(count)
    ]


def saved_model(folder: Path, kind: str = "llama") -> PreTrainedModel:
    """A tiny model, also written to ``folder``."""
    model = tiny_model(kind)
    model.save_pretrained(folder)
    return model


def arguments(**changes: Any) -> TrainingArguments:
    """Of a Trainer that is quick, quiet and repeatable."""
    given = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "seed": 3,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**given, **changes})


def tail_config(model: Path, store: Path, **changes: Any) -> TailConfig:
    """Options of a simulated server on a free port."""
    given = {
        "model": str(model),
        "cut": 2,
        "port": 0,
        "store": str(store / "store"),
        "sealing_key": str(store / "key"),
        "provider": "sim",
        "allow_simulated": True,
        "lora_dropout": 0.0,
        "seal_steps": 2,
        "linger": 20.0,
        "request_timeout": 20.0,
    }
    return TailConfig(**{**given, **changes})


def client_config(model: Path, port: int, **changes: Any) -> ClientConfig:
    """Options of its client."""
    given = {
        "model": str(model),
        "cut": 2,
        "port": port,
        "name": "alice",
        "key_file": "-",
        "tees": ["sim"],
        "allow_simulated": True,
        "encode_batch_size": 1,
        "shard_samples": 4,
        "request_timeout": 20.0,
        "heartbeat": 0.2,
    }
    return ClientConfig(**{**given, **changes})


def make_client(model: Path, port: int, *, psk: bytes = PSK, **changes: Any) -> SplitClient:
    """A client with the pre-shared key of the tests."""
    config = client_config(model, port, **changes)
    return SplitClient(config, identity=Identity(config.name, psk=psk))


@contextmanager
def running(
    config: TailConfig, *, spf: float = 0.0, names: tuple[str, ...] = ("alice",), **training: Any
) -> Iterator[tuple[TailServer, int]]:
    """A server in a thread of this process; stopped and cleaned at the end."""
    server = TailServer(
        config,
        SPFConfig(ratio=spf),
        arguments(**training),
        clients={name: Credential(psk=PSK) for name in names},
    )
    ports: queue.Queue[int] = queue.Queue()
    thread = threading.Thread(target=server.serve, args=(ports.put,), daemon=True)
    thread.start()
    try:
        yield server, ports.get(timeout=30)
    finally:
        server.stop()
        thread.join(timeout=30)
        server.cleanup()


class Proxy:
    """A TCP relay between one client and a server that keeps what it saw and may change it.

    Args of the constructor: the server's port now, and what to do with each piece going up and down.
    """

    def __init__(
        self,
        target: Callable[[], int],
        *,
        up: Callable[[bytes], bytes] = bytes,
        down: Callable[[bytes], bytes] = bytes,
    ) -> None:
        self._target, self._change = target, {"up": up, "down": down}
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.seen = {"up": bytearray(), "down": bytearray()}
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target()), timeout=5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            for source, sink, way in ((near, far, "up"), (far, near, "down")):
                threading.Thread(target=self._relay, args=(source, sink, way), daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        try:
            while piece := source.recv(65536):
                self.seen[way] += piece
                sink.sendall(self._change[way](piece))
        except OSError:
            pass
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def close(self) -> None:
        self._listener.close()


def free_port() -> int:
    """A port that nobody uses at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One thread each: tests run side by side, and a pool larger than the machine only waits.
torch.set_num_threads(1)
