"""``mmhf tee-split serve | encode | train | fetch | keygen | verify | demo``: both ends of split
fine-tuning."""

import argparse
import copy
import json
import logging
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainingArguments

from hf_plugins.process_group import run_command
from hf_plugins.recipes import check_weights, read_recipe
from hf_plugins.tee_split.attestation import AttestationError
from hf_plugins.tee_split.channel import ChannelClosed
from hf_plugins.tee_split.client import ServerRefusedError, SplitClient
from hf_plugins.tee_split.config import ClientConfig, SPFConfig, TailConfig
from hf_plugins.tee_split.frames import FrameError
from hf_plugins.tee_split.model import decoder_parts, hidden_states, split_model
from hf_plugins.tee_split.server import TailServer
from hf_plugins.tee_split.trainer import SplitTrainer


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Words after the program's name; those of the process by default.

    Returns:
        0 if all is well, 1 if `verify` found a difference or the server was refused, 2 if the command could
        not run.
    """
    parser = argparse.ArgumentParser(prog="mmhf tee-split", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    texts = {
        "serve": "the tail's server; runs in the enclave, also under accelerate launch",
        "encode": "encode the data and send them, sealed (cache mode)",
        "train": "encode and send if needed, wait for or drive the training, fetch the adapter",
        "fetch": "fetch the trained adapter",
    }
    for name, text in texts.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("recipe", type=Path, help="YAML or JSON file of options")
        if name != "serve":
            command.add_argument("--out", type=Path, default=Path("adapter"), help="folder of the adapter")
            command.add_argument(
                "--data", type=Path, help="JSON lines with input_ids and labels, or with text"
            )
    keygen = commands.add_parser("keygen", help="make a client's key; prints its line for clients.json")
    keygen.add_argument("name", help="name of the client, letters and digits")
    keygen.add_argument("out", type=Path, help="file of the private key")
    verify = commands.add_parser(
        "verify", help="check that the halves of a model equal the whole, bit by bit"
    )
    verify.add_argument("model", type=Path, help="save_pretrained folder")
    commands.add_parser(
        "demo", help="client and server as two processes with a tiny model; simulated, no hardware"
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    run = {"serve": _serve, "keygen": _keygen, "verify": _verify, "demo": _demo}.get(args.command, _client)
    try:
        return run(args)
    except (AttestationError, FrameError, ServerRefusedError, ChannelClosed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, TypeError, OSError, KeyError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parse(path: Path, *kinds: Any) -> tuple[Any, ...]:
    parser = HfArgumentParser(kinds)
    return parser.parse_json_file(path) if path.suffix == ".json" else parser.parse_dict(read_recipe(path))


def _serve(args: argparse.Namespace) -> int:
    config, spf, arguments = _parse(args.recipe, TailConfig, SPFConfig, TrainingArguments)
    server = TailServer(config, spf, arguments)
    try:
        server.serve(on_listening=lambda port: print(json.dumps({"listening": port}), flush=True))
    finally:
        server.cleanup()
    return 0


def _rows(path: Path | None, config: ClientConfig) -> list[dict[str, Any]]:
    if path is None:
        raise ValueError("no data: name a JSON-lines file with --data")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if rows and "input_ids" not in rows[0]:
        tokenizer = AutoTokenizer.from_pretrained(config.model)
        rows = [{"input_ids": tokenizer(row["text"])["input_ids"]} for row in rows]
    return rows


def _client(args: argparse.Namespace) -> int:
    # Only what drives a Trainer of its own needs its options.
    config, arguments = _parse(args.recipe, ClientConfig, TrainingArguments)
    with SplitClient(config) as client:
        if args.command == "fetch":
            print(client.fetch(args.out))
            return 0
        rows = _rows(args.data, config)
        if config.mode == "cache":
            shards = client.upload(
                rows, report=lambda done, total: logging.info("sent shard %d of %d", done, total)
            )
            print(json.dumps({"samples": len(rows), "shards": shards, "bytes": client.bytes_sent}))
            if args.command == "encode":
                return 0
            client.train(report=lambda progress: logging.info("server: %s", progress))
        elif config.mode == "bidirectional":
            raise ValueError(
                "bidirectional mode needs a client half that learns: use SplitTrainer(front=...) in Python"
            )
        else:
            SplitTrainer(client, arguments, train_dataset=rows).train()
            client.finish()
        print(client.fetch(args.out))
    return 0


def _keygen(args: argparse.Namespace) -> int:
    if not args.name.isalnum():
        raise ValueError(f"a client's name has letters and digits; got {args.name!r}")
    key = Ed25519PrivateKey.generate()
    handle = os.open(args.out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    print(json.dumps({args.name: {"public_key": key.public_key().public_bytes_raw().hex()}}))
    return 0


def _verify(args: argparse.Namespace) -> int:
    check_weights(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    vocabulary, layers = model.config.vocab_size, len(decoder_parts(model).layers)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    positions = torch.arange(9).expand_as(ids)
    rest = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    wrong = 0
    with torch.no_grad():
        whole = model(input_ids=ids, **rest).logits
        for k in range(1, layers):
            client = split_model(copy.deepcopy(model), k, "client", allow_unverified=True)
            server = split_model(copy.deepcopy(model), k, "server", allow_unverified=True)
            logits = server(inputs_embeds=hidden_states(client, ids, mask), **rest).logits
            difference = (logits - whole)[mask.bool()].abs().max().item()
            print(f"k={k}: {'bit-equal' if difference == 0 else f'differs by {difference:.3g}'}")
            wrong += difference != 0
    return int(wrong > 0)


def _demo_server(pipe: Any, config: TailConfig, credentials: Any) -> None:
    arguments = TrainingArguments(
        output_dir="unused", per_device_train_batch_size=4, max_steps=20, learning_rate=1e-2, use_cpu=True,
        disable_tqdm=True, logging_steps=5,
    )  # fmt: skip
    server = TailServer(config, SPFConfig(ratio=0.25), arguments, clients=credentials)
    server.serve(on_listening=pipe.send)
    server.cleanup()


def _demo(args: argparse.Namespace) -> int:
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_plugins.tee_split.peft import load_spf
    from hf_plugins.tee_split.transcript import Credential, Identity

    psk, folder = os.urandom(32), Path(tempfile.mkdtemp(prefix="tee-split-demo-"))
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    rows = [{"input_ids": [(start + 5 * step) % 64 for step in range(24)]} for start in range(64)]
    shared: dict[str, Any] = {"model": str(folder / "model"), "cut": 2, "allow_simulated": True}
    tail = TailConfig(
        **shared,
        port=0,
        provider="sim",
        store=str(folder / "store"),
        sealing_key=str(folder / "key"),
        linger=30,
    )
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    server = context.Process(target=_demo_server, args=(theirs, tail, {"demo": Credential(psk=psk)}))
    server.start()
    near = ClientConfig(**shared, port=mine.recv(), name="demo", key_file="-", tees=["sim"])
    with SplitClient(near, identity=Identity("demo", psk=psk)) as client:
        client.upload(rows)
        client.train()
        adapter = client.fetch(folder / "adapter")
    server.join()
    batch = torch.tensor([row["input_ids"] for row in rows])
    with torch.no_grad():
        before = model.eval()(input_ids=batch, labels=batch).loss.item()
        whole = PeftModel.from_pretrained(model, adapter)
        load_spf(whole, adapter)
        after = whole.eval()(input_ids=batch, labels=batch).loss.item()
    tokens = batch.numel()
    print(f"evidence: {client.attested.label() if client.attested else 'none'}")
    print(
        f"sent: {client.bytes_sent} bytes for {tokens} tokens; loss of the whole model {before:.3f} -> "
        f"{after:.3f}"
    )
    print(f"adapter: {adapter}")
    return 0


if __name__ == "__main__":
    run_command(main)
