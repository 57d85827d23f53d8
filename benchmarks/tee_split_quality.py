"""Split fine-tuning of a small language model on GSM8K over loopback, client and server as two processes:
LoRA on the whole model, LoRA behind the cut, and LoRA with SPF, at three cuts.

Every arm sees the same samples in the same order; the whole model with the fetched adapter is scored on test
rows nobody trained on. Needs ``work_dirs/small_lm`` (``python tools/small_lm.py work_dirs/small_lm``) and the
data set gsm8k; ``--short`` needs neither. A finished run is kept and not run again.
"""

import argparse
import copy
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from benchmarks.record import RESULTS, write_result
from hf_plugins.tee_split import ClientConfig, SPFConfig, SplitClient, SplitTrainer, TailConfig, TailServer
from hf_plugins.tee_split.peft import SPF_WEIGHTS, default_target, load_spf
from hf_plugins.tee_split.trainer import pad_token_batch
from hf_plugins.tee_split.transcript import Credential, Identity
from hf_plugins.whole_files import write_json
from tools.real_data import data_set, read_rows

RATIOS = (0.0, 0.05, 0.1, 0.5)
PSK = bytes(range(32))
Rows = list[dict[str, list[int]]]


def gsm8k(folder: Path, *, num_train: int, num_test: int, max_tokens: int) -> tuple[Rows, Rows]:
    """Token ids and labels of questions with answers; only the answer is predicted."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        question = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        answer = [*tokenizer(f" {row['answer']}")["input_ids"], tokenizer.eos_token_id]
        ids = (question + answer)[:max_tokens]
        return {"input_ids": ids, "labels": ([-100] * len(question) + answer)[:max_tokens]}

    train = [encode(row) for row in read_rows(data_set("gsm8k") / "train.jsonl.gz")]
    test = [encode(row) for row in read_rows(data_set("gsm8k") / "test.jsonl.gz")]
    enough = [row for row in train if sum(label != -100 for label in row["labels"]) > 8]
    return enough[:num_train], test[:num_test]


def generated(folder: Path) -> tuple[Rows, Rows]:
    """A tiny model and rows of counting numbers, for ``--short``."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    rows = [{"input_ids": [(start + 3 * step) % 64 for step in range(16)]} for start in range(64)]
    return [{**row, "labels": row["input_ids"]} for row in rows[:48]], [
        {**row, "labels": row["input_ids"]} for row in rows[48:]
    ]


@torch.no_grad()
def score(model: Any, rows: Rows, batch_size: int = 8) -> dict[str, float]:
    """Loss in nats per predicted token and next-token accuracy."""
    model.eval()
    loss, right, count = 0.0, 0, 0
    for start in range(0, len(rows), batch_size):
        batch = pad_token_batch(rows[start : start + batch_size])
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        keep = labels != -100
        loss += torch.nn.functional.cross_entropy(logits[keep], labels[keep], reduction="sum").item()
        right += int((logits[keep].argmax(-1) == labels[keep]).sum())
        count += int(keep.sum())
    return {"loss": loss / count, "accuracy": right / count, "perplexity": math.exp(loss / count)}


def arguments(seed: int, settings: dict[str, Any], **changes: Any) -> TrainingArguments:
    """Of every arm's Trainer."""
    given = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": settings["batch_size"],
        "num_train_epochs": settings["epochs"],
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": [],
        "seed": seed,
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    return TrainingArguments(**{**given, **changes})


def run_full(
    model_folder: Path, rows: Rows, seed: int, settings: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """LoRA on every layer of the whole model, one process: what the split is compared with."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    set_seed(seed)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=32, lora_dropout=0.1, target_modules=default_target(model)
    )
    model = get_peft_model(model, lora)
    trainer = Trainer(
        model=model, args=arguments(seed, settings), train_dataset=rows, data_collator=pad_token_batch
    )
    start = time.perf_counter()
    trainer.train()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return model, {"train_seconds": time.perf_counter() - start, "trainable": trainable}


def _serve(pipe: Any, config: TailConfig, ratio: float, seed: int, settings: dict[str, Any]) -> None:
    transformers.utils.logging.disable_progress_bar()
    server = TailServer(
        config,
        SPFConfig(ratio=ratio),
        arguments(seed, settings),
        clients={"alice": Credential(psk=PSK)},
    )
    start = time.process_time()
    server.serve(on_listening=pipe.send)
    server.cleanup()
    pipe.send(time.process_time() - start)


def run_split(
    model_folder: Path,
    rows: Rows,
    seed: int,
    settings: dict[str, Any],
    *,
    cut: int,
    ratio: float,
    mode: str,
    dropout: float = 0.1,
) -> tuple[Path, dict[str, Any]]:
    """One split training: the server is a process of its own, forked so that it need not import anew."""
    store = tempfile.mkdtemp()
    shared: dict[str, Any] = {"model": str(model_folder), "cut": cut, "mode": mode, "allow_simulated": True}
    tail = TailConfig(
        **shared,
        port=0,
        provider="sim",
        store=store,
        sealing_key=f"{store}/key",
        seal_steps=1000,
        linger=60,
        lora_dropout=dropout,
    )
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    server = context.Process(target=_serve, args=(theirs, tail, ratio, seed, settings))
    server.start()
    config = ClientConfig(
        **shared,
        port=mine.recv(),
        name="alice",
        key_file="-",
        tees=["sim"],
        encode_batch_size=1,
        max_tokens=1024,
    )
    start = time.perf_counter()
    with SplitClient(config, identity=Identity("alice", psk=PSK)) as client:
        record: dict[str, Any] = {}
        if mode == "cache":
            client.upload(rows)
            record["upload_seconds"] = time.perf_counter() - start
            record["trainable"] = client.train()["trainable"]
        else:
            local = arguments(seed, settings, max_grad_norm=0.0)
            SplitTrainer(client, local, train_dataset=rows).train()
            record["trainable"] = client.finish()["trainable"]
        record["train_seconds"] = time.perf_counter() - start - record.get("upload_seconds", 0.0)
        folder = client.fetch(tempfile.mkdtemp())
    record |= {"bytes_sent": client.bytes_sent, "server_cpu_seconds": mine.recv()}
    server.join()
    return folder, record


def whole_model(model_folder: Path, adapter: Path) -> Any:
    """The unsplit model with a fetched adapter."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), adapter)
    if (adapter / SPF_WEIGHTS).is_file():
        load_spf(model, adapter)
    return model


def one_run(
    name: str, plan: dict[str, Any], model_folder: Path, data: tuple[Rows, Rows], keep: Path
) -> dict[str, Any]:
    """Run one arm with one seed unless its record lies there."""
    path = keep / f"{name}.json"
    if path.is_file():
        return json.loads(path.read_text())
    train, test = data
    settings = plan["settings"]
    start = time.perf_counter()
    if plan["arm"] == "base":
        model, record = AutoModelForCausalLM.from_pretrained(model_folder), {}
    elif plan["arm"] == "full":
        model, record = run_full(model_folder, train, plan["seed"], settings)
    else:
        options = {key: plan[key] for key in ("cut", "ratio", "mode", "dropout") if key in plan}
        adapter, record = run_split(model_folder, train, plan["seed"], settings, **options)
        model = whole_model(model_folder, adapter)
        weights = load_file(adapter / "adapter_model.safetensors")
        record["checksum"] = float(sum(tensor.double().abs().sum() for tensor in weights.values()))
    record |= {**plan, **score(model, test), "seconds": time.perf_counter() - start}
    write_json(path, record)
    print(name, {key: record[key] for key in ("loss", "accuracy", "seconds")}, flush=True)
    return record


def plans(num_layers: int, seeds: Sequence[int], settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """All runs by name, in the order in which they are made."""
    common = {"settings": settings, "mode": "cache"}
    found = {"base": {**common, "arm": "base", "seed": 0}}
    cuts = sorted({num_layers // 4, num_layers // 2, 3 * num_layers // 4})
    for seed in seeds:
        found[f"full-s{seed}"] = {**common, "arm": "full", "seed": seed}
        for cut in cuts:
            for ratio in RATIOS:
                name = f"k{cut}-r{ratio:g}-s{seed}"
                found[name] = {**common, "arm": "split", "cut": cut, "ratio": ratio, "seed": seed}
    # Without dropout, whose random draws the two modes interleave with different other ones.
    for mode in ("stream", "cache"):
        name = f"k{num_layers // 2}-{mode}-nodropout-s{seeds[0]}"
        same = {"arm": "split", "cut": num_layers // 2, "ratio": 0.0, "seed": seeds[0], "dropout": 0.0}
        found[name] = {**common, **same, "mode": mode}
    # The middle cut first, with all its seeds: a run that is stopped early leaves whole rows.
    outer = {name: plan.get("cut", num_layers // 2) != num_layers // 2 for name, plan in found.items()}
    return {name: found[name] for name in sorted(found, key=lambda name: (outer[name], found[name]["seed"]))}


def _spread(values: Sequence[float], digits: int) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} +- {statistics.stdev(values):.{digits}f}"


def table(records: dict[str, dict[str, Any]], tokens: int, targets: int) -> list[list[Any]]:
    """One row per arm, mean and standard deviation over seeds."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for record in records.values():
        if record["arm"] == "base":
            label = "base model, untrained"
        elif record["arm"] == "full":
            label = "LoRA on all layers, one process"
        elif record["mode"] == "stream":
            label = f"split, k={record['cut']}, LoRA, no dropout, stream"
        elif "dropout" in record:
            label = f"split, k={record['cut']}, LoRA, no dropout, cache"
        else:
            spf = f" + SPF {record['ratio']:g}" if record["ratio"] else ""
            label = f"split, k={record['cut']}, LoRA{spf}"
        arms.setdefault(label, []).append(record)
    rows = []
    for label, runs in arms.items():
        sent = [run["bytes_sent"] / tokens for run in runs if "bytes_sent" in run]
        speed = [
            tokens * run["settings"]["epochs"] / run["train_seconds"]
            for run in runs
            if "train_seconds" in run
        ]
        rows.append(
            [
                label,
                len(runs),
                _spread([run["loss"] for run in runs], 3),
                _spread([100 * run["accuracy"] for run in runs], 2),
                runs[0].get("trainable", 0),
                f"{statistics.median(sent):.1f}" if sent else "-",
                f"{statistics.median(speed):.0f}" if speed else "-",
            ]
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, write the result file, print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, default=Path("work_dirs/small_lm"), help="save_pretrained folder"
    )
    parser.add_argument("--num-train", type=int, default=128, help="training samples")
    parser.add_argument("--num-test", type=int, default=40, help="test samples")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/tee_split_quality"))
    parser.add_argument("--limit", type=int, default=None, help="stop after this many runs (timing)")
    parser.add_argument("--short", action="store_true", help="tiny model and generated rows, result not kept")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    out = RESULTS
    if options.short:
        options.work_dir = Path(tempfile.mkdtemp(prefix="benchmark-"))
        options.model, options.seeds, out = options.work_dir / "model", [0], options.work_dir
        data = generated(options.model)
    else:
        data = gsm8k(options.model, num_train=options.num_train, num_test=options.num_test, max_tokens=256)
    settings = {"batch_size": 4, "epochs": options.epochs, "learning_rate": options.learning_rate}
    num_layers = json.loads((options.model / "config.json").read_text())["num_hidden_layers"]
    keep = options.work_dir / "runs"
    keep.mkdir(parents=True, exist_ok=True)
    records = {}
    for name, plan in list(plans(num_layers, options.seeds, settings).items())[: options.limit]:
        records[name] = one_run(name, copy.deepcopy(plan), options.model, data, keep)
    tokens = sum(len(row["input_ids"]) for row in data[0])
    targets = sum(label != -100 for row in data[1] for label in row["labels"][1:])
    same = None
    middle = num_layers // 2
    stream, cache = (f"k{middle}-{mode}-nodropout-s{options.seeds[0]}" for mode in ("stream", "cache"))
    if stream in records and cache in records:
        same = records[stream]["checksum"] == records[cache]["checksum"]
    hidden = json.loads((options.model / "config.json").read_text())["hidden_size"]
    path = write_result(
        "tee_split_quality",
        command="python -m benchmarks.tee_split_quality",
        config={
            **settings,
            "num_train": len(data[0]),
            "num_test": len(data[1]),
            "tokens": tokens,
            "layers": num_layers,
        },
        seeds=options.seeds,
        packages=("transformers", "peft", "cryptography"),
        columns=[
            "arm",
            "runs",
            "test loss (nats per answer token)",
            "next-token accuracy (%)",
            "parameters that learn",
            "bytes sent per token",
            "tokens/s",
        ],
        rows=table(records, tokens, targets),
        notes=[
            f"GSM8K, {len(data[0])} training and {len(data[1])} test rows ({targets} scored answer tokens), "
            "one epoch, LoRA r=8 on the attention's output projection; mean and standard deviation over "
            "seeds.",
            f"Hidden states are fp32 here, so the floor is 4 * {hidden} = {4 * hidden} bytes a token, plus 4 "
            "of labels.",
            "Tokens/s is the median of the training alone (in cache mode without the single upload), on a "
            "machine shared with other work: an indication only.",
            f"Stream and cache mode without dropout end with equal adapters: {same}.",
            "The server showed simulated evidence: no hardware protected these runs.",
        ],
        details={name: record for name, record in records.items()},
        folder=out,
    )
    print(json.dumps({"benchmark": "tee_split_quality", "result": path.name, "runs": len(records)}))
    return 0


if __name__ == "__main__":
    # Children of a fork must not spread over all cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    raise SystemExit(main())
