"""What the protection costs: sealing against bare AES-GCM of the same library, bytes per token against the
floor, a split run against the same computation without encryption and against the unsplit model, overlap on
and off, and the masked linear layer of method 1.

Client and server are two processes on loopback; a generated model, no data needed. Evidence is simulated.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import transformers
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from benchmarks.record import RESULTS, spread, write_result
from hf_plugins.tee_split import ClientConfig, SPFConfig, SplitClient, SplitTrainer, TailConfig, TailServer
from hf_plugins.tee_split.batches import Sample, collate, join_samples
from hf_plugins.tee_split.frames import CHUNK_BYTES, DATA, Opener, Sealer, num_chunks, sealed_bytes
from hf_plugins.tee_split.masking import MaskedLinear
from hf_plugins.tee_split.model import load_half
from hf_plugins.tee_split.peft import attach_adapter
from hf_plugins.tee_split.tensors import pack, unpack
from hf_plugins.tee_split.trainer import pad_token_batch
from hf_plugins.tee_split.transcript import Credential, Identity

KEY, PSK = bytes(range(32)), bytes(range(32))


class Cost(NamedTuple):
    """What a run took."""

    cpu: float
    """CPU seconds of all its processes: what other work on the machine changes least."""
    wall: float
    """Seconds on the clock."""


def seconds(work: Callable[[], Any]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def sealing(megabytes: int, rounds: int) -> dict[str, list[float]]:
    """GB/s of bare AES-GCM in chunks, and of whole messages (layout, frames, counters), both ways, in
    turns."""
    tensor = torch.randn(megabytes * 2**20 // 2 // 4096, 4096).to(torch.bfloat16)
    size, out = tensor.nbytes, memoryview(bytearray(CHUNK_BYTES + 16))
    raw = memoryview(tensor.view(torch.uint8).numpy()).cast("B")
    cipher, header = AESGCM(KEY), bytes(37)
    chunks = [raw[at : at + CHUNK_BYTES] for at in range(0, size, CHUNK_BYTES)]
    boxes = [memoryview(cipher.encrypt(bytes(12), chunk, header)) for chunk in chunks]
    frame = [
        bytes(piece) for piece in Sealer(KEY, direction=1, session=1).seal(DATA, pack({}, {"x": tensor}))
    ]

    def bare_seal() -> None:
        for number, chunk in enumerate(chunks):
            cipher.encrypt_into(number.to_bytes(12, "big"), chunk, header, out[: chunk.nbytes + 16])

    def bare_open() -> None:
        # Fresh memory, as every receiver needs: its page faults cost more than the cipher.
        plain = memoryview(bytearray(size))
        for number, box in enumerate(boxes):
            start = number * CHUNK_BYTES
            cipher.decrypt_into(bytes(12), box, header, plain[start : start + box.nbytes - 16])

    def our_seal() -> None:
        for _ in Sealer(KEY, direction=1, session=1).seal(DATA, pack({"shard": 0}, {"x": tensor})):
            pass

    def our_open() -> None:
        opener = Opener(KEY, direction=1, session=1)
        head = opener.check(frame[0], max_bytes=2**32)
        buffer = bytearray(head.length)
        view, count = memoryview(buffer), num_chunks(head.length)
        for index in range(count):
            part = view[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
            opener.open_chunk(frame[0], index, memoryview(frame[1 + index]), part, last=index == count - 1)
        unpack(buffer)

    found: dict[str, list[float]] = {}
    works = {"AES-GCM seal": bare_seal, "seal": our_seal, "AES-GCM open": bare_open, "open": our_open}
    for turn in range(rounds + 1):
        for name, work in works.items():
            elapsed = seconds(work)
            if turn:
                found.setdefault(name, []).append(size / elapsed / 1e9)
    return found


def bytes_per_token(dim: int, num_tokens: int, bucket: int) -> float:
    """Bytes on the wire per token in bf16, over the floor of 2 * dim."""
    sample = Sample(
        torch.zeros(num_tokens, dim, dtype=torch.bfloat16), torch.zeros(num_tokens, dtype=torch.int32)
    )
    length = sum(part.nbytes for part in pack({"shard": 0}, join_samples([sample]), bucket=bucket))
    return sealed_bytes(length) / num_tokens / (2 * dim)


def arguments(settings: dict[str, Any], **changes: Any) -> TrainingArguments:
    """Of every Trainer here."""
    given = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": settings["epochs"],
        "learning_rate": 1e-3,
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    return TrainingArguments(**{**given, **changes})


class _Plain(Dataset):
    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def tail_config(folder: Path, settings: dict[str, Any], mode: str) -> TailConfig:
    """Options of the server."""
    store = tempfile.mkdtemp()
    return TailConfig(
        model=str(folder), cut=settings["cut"], mode=mode, port=0, provider="sim", allow_simulated=True,
        store=store, sealing_key=f"{store}/key", seal_steps=10_000, linger=60, lora_dropout=0.0,
    )  # fmt: skip


def client_config(folder: Path, settings: dict[str, Any], port: int, mode: str, ahead: int) -> ClientConfig:
    """Options of the client."""
    return ClientConfig(
        model=str(folder), cut=settings["cut"], mode=mode, port=port, name="alice", key_file="-",
        tees=["sim"], allow_simulated=True, shard_samples=8, ahead=ahead, heartbeat=0.25,
    )  # fmt: skip


def _serve(pipe: Any, config: TailConfig, settings: dict[str, Any]) -> None:
    server = TailServer(
        config, SPFConfig(ratio=0.0), arguments(settings), clients={"alice": Credential(psk=PSK)}
    )
    server.serve(on_listening=pipe.send)
    server.cleanup()
    pipe.send(time.process_time())


def split_run(
    folder: Path, rows: list, settings: dict[str, Any], *, mode: str = "cache", ahead: int = 3
) -> Cost:
    """A split run: CPU of both processes, and time from the first byte to the trained tail."""
    begun, context = time.process_time(), multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    server = context.Process(target=_serve, args=(theirs, tail_config(folder, settings, mode), settings))
    server.start()
    config = client_config(folder, settings, mine.recv(), mode, ahead)
    with SplitClient(config, identity=Identity("alice", psk=PSK)) as client:
        start = time.perf_counter()
        if mode == "cache":
            client.upload(rows)
            client.train()
        else:
            SplitTrainer(client, arguments(settings, max_grad_norm=0.0), train_dataset=rows).train()
            client.finish()
        elapsed = time.perf_counter() - start
    server.join()
    return Cost(mine.recv() + time.process_time() - begun, elapsed)


def unprotected_run(folder: Path, rows: list, settings: dict[str, Any]) -> Cost:
    """The same computation in one process, without sealing, network or attestation."""
    begun, start = time.process_time(), time.perf_counter()
    client = SplitClient(client_config(folder, settings, 1, "cache", 0), identity=Identity("alice", psk=PSK))
    samples = []
    for first in range(0, len(rows), 8):
        samples += client.encode(rows[first : first + 8])
    set_seed(42)
    model = attach_adapter(
        load_half(folder, settings["cut"], "server").model, tail_config(folder, settings, "cache")
    )
    Trainer(
        model=model, args=arguments(settings), train_dataset=_Plain(samples), data_collator=collate
    ).train()
    return Cost(time.process_time() - begun, time.perf_counter() - start)


def unsplit_run(folder: Path, rows: list, settings: dict[str, Any]) -> Cost:
    """LoRA on the same layers of the whole model: the front layers run in every epoch."""
    begun, start = time.process_time(), time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder)
    from peft import LoraConfig, get_peft_model

    layers = list(range(settings["cut"], model.config.num_hidden_layers))
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=32,
        target_modules=["self_attn.o_proj"],
        layers_to_transform=layers,
    )
    trainer = Trainer(
        model=get_peft_model(model, lora),
        args=arguments(settings),
        train_dataset=rows,
        data_collator=pad_token_batch,
    )
    trainer.train()
    return Cost(time.process_time() - begun, time.perf_counter() - start)


def masked_layer(size: int, rounds: int) -> dict[str, float]:
    """Median CPU milliseconds of a linear layer of method 1, part by part, and of the plain fp32 product."""
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(size, size)), rng.normal(size=(128, size))
    w32, x32 = weight.astype(np.float32), x.astype(np.float32)
    found: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[..., Any], *inputs: Any) -> Any:
        start = time.process_time()
        result = work(*inputs)
        found.setdefault(name, []).append(1e3 * (time.process_time() - start))
        return result

    for _ in range(rounds):
        timed("plain fp32 product", np.matmul, x32, w32.T)
        for domain, bits in (("prime", 4), ("ring", 12)):
            layer = MaskedLinear(weight, fraction_bits=bits, domain=domain)
            mask = timed(f"{domain}: pad and its product, ahead of time, in the enclave", layer.draw, 128)
            sent = timed(f"{domain}: mask", layer.mask, x, mask)
            answer = timed(f"{domain}: product on the device", layer.device, sent)
            timed(f"{domain}: check and unmask, in the enclave", layer.unmask, sent, answer, mask)
    return {name: statistics.median(values) for name, values in found.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the result file, print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of the training runs, in turns")
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a sample")
    parser.add_argument("--dim", type=int, default=192, help="hidden size of the generated model")
    parser.add_argument("--short", action="store_true", help="small sizes, one round, result not kept")
    args = parser.parse_args(argv)
    out = RESULTS
    if args.short:
        args.rounds, args.samples, args.tokens, args.dim = 1, 16, 32, 64
        out = Path(tempfile.mkdtemp(prefix="benchmark-"))
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = Path(tempfile.mkdtemp(prefix="tee-split-model-"))
    set_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=args.dim,
        intermediate_size=3 * args.dim,
        num_hidden_layers=8,
        num_attention_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 4096, (args.samples, args.tokens), generator=generator)
    rows = [{"input_ids": row, "labels": row} for row in ids.tolist()]
    settings = {"cut": 4, "epochs": 2}
    speed = sealing(4 if args.short else 16, 3 if args.short else 15)
    masked = masked_layer(128 if args.short else 512, 1 if args.short else 3)
    arms: dict[str, Callable[[], Cost]] = {
        "split, cache": lambda: split_run(folder, rows, settings),
        "same computation, no protection": lambda: unprotected_run(folder, rows, settings),
        "unsplit model": lambda: unsplit_run(folder, rows, settings),
        "split, cache, no overlap": lambda: split_run(folder, rows, settings, ahead=0),
        "split, stream": lambda: split_run(folder, rows, settings, mode="stream"),
        "split, stream, no overlap": lambda: split_run(folder, rows, settings, mode="stream", ahead=0),
    }
    costs: dict[str, list[Cost]] = {name: [] for name in arms}
    for _ in range(args.rounds):
        for name, arm in arms.items():
            costs[name].append(arm())
    tokens = args.samples * args.tokens * settings["epochs"]

    def ratio(over: str, under: str, field: str = "cpu") -> list[float]:
        return [getattr(a, field) / getattr(b, field) for a, b in zip(costs[over], costs[under], strict=True)]

    def speeds(name: str) -> str:
        return spread([tokens / cost.cpu for cost in costs[name]])

    seal_share = [a / b for a, b in zip(speed["seal"], speed["AES-GCM seal"], strict=True)]
    open_share = [a / b for a, b in zip(speed["open"], speed["AES-GCM open"], strict=True)]
    protected = ratio("split, cache", "same computation, no protection")
    floor, bucketed = bytes_per_token(4096, 512, 0), bytes_per_token(4096, 512, 4096)
    table = [
        [
            "sealing a message, GB per CPU second",
            spread(speed["seal"]),
            f"{spread(seal_share)} of bare AES-256-GCM",
        ],
        [
            "opening a message, GB per CPU second",
            spread(speed["open"]),
            f"{spread(open_share)} of bare AES-256-GCM",
        ],
        [
            "bytes per token, bf16, d=4096, 512 tokens",
            f"{2 * 4096 * floor:.1f}",
            f"{floor:.5f} of the floor 2d; {bucketed:.5f} with 4 KiB buckets",
        ],
        [
            "split run, cache mode, tokens per CPU second",
            speeds("split, cache"),
            f"CPU time {spread(protected)} of the same computation without protection",
        ],
        [
            "unsplit model, tokens per CPU second",
            speeds("unsplit model"),
            f"the split run takes {spread(ratio('split, cache', 'unsplit model'))} of its CPU time",
        ],
        [
            "split run, stream mode, tokens per CPU second",
            speeds("split, stream"),
            f"CPU time {spread(ratio('split, stream', 'unsplit model'))} of the unsplit model",
        ],
    ]
    for mode in ("cache", "stream"):
        walls = ratio(f"split, {mode}, no overlap", f"split, {mode}", "wall")
        table.append([f"overlap off, {mode} mode, clock time over overlap on", spread(walls), ""])
    table += [[f"method 1, {name}, CPU ms", f"{value:.2f}", ""] for name, value in masked.items()]
    path = write_result(
        "tee_split",
        command="python -m benchmarks.tee_split",
        config={
            **settings,
            "samples": args.samples,
            "tokens": args.tokens,
            "dim": args.dim,
            "layers": 8,
            "threads": 1,
        },
        seeds=[0],
        packages=("cryptography", "transformers", "peft", "numpy"),
        columns=["what", "median (range)", "against"],
        rows=table,
        notes=[
            "Every ratio is taken within one turn of the run, so that other work on the machine falls on "
            "both sides.",
            f"Llama of 8 layers and width {args.dim}, cut 4, fp32, {args.samples} samples of {args.tokens} "
            "tokens, 2 epochs; one thread a process. Times hold loading, encoding, sending, sealing to disk "
            "and training.",
            f"Method 1: 128 rows through a {512 if not args.short else 128}-wide layer. What the enclave "
            "computes ahead of time is the product itself, so nothing is saved in all; that is why method 2 "
            "is the default.",
            "Evidence is simulated; the cost of an enclave itself is not in these figures.",
        ],
        details={
            "seconds": {name: [cost._asdict() for cost in found] for name, found in costs.items()},
            "gigabytes_per_second": speed,
            "method_1_milliseconds": masked,
        },
        folder=out,
    )
    summary = {"seal_share": statistics.median(seal_share), "overhead": statistics.median(protected) - 1}
    print(json.dumps({"benchmark": "tee_split", "result": path.name, **summary}))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    raise SystemExit(main())
