"""MiniLM shortened before fine-tuning on real classification sets: GradPruner against every baseline.

``python -m benchmarks.gradpruner_text`` scores all-MiniLM-L6-v2 with a few LoRA steps on each set, drops 1,
2 and 3 of its 6 layers by each method, fine-tunes the short models for the same number of steps and reports
accuracy on rows never trained on. Every finished run is kept in ``work_dirs/gradpruner_text`` and not run
again; methods that choose the same layers share a run. Writes ``docs/results/gradpruner_text.json``.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.record import RESULTS, write_result
from hf_plugins.gradpruner import (
    GradientHistory,
    GradPrunerCallback,
    GradPrunerConfig,
    PruningPlan,
    baseline_plan,
    plan_pruning,
    prune_model,
)
from hf_plugins.gradpruner.storage import HISTORY_FOLDER, read_scores
from hf_plugins.whole_files import write_json
from tools.real_data import data_set, minilm, read_rows

WORK = Path(__file__).resolve().parent.parent / "work_dirs" / "gradpruner_text"
SETS = ("sst2", "financial_phrasebank", "banking77")
METHODS = (
    "gradpruner",
    "gradpruner, dropped only",
    "reverse",
    "random",
    "block_influence",
    "laco",
    "magnitude",
)
LAYERS, TOKENS, BATCH = 6, 24, 16


def rows_of(name: str) -> tuple[list[dict], list[dict]]:
    """Training and test rows with ``text`` and ``label``; the phrasebank's last 800 rows are its test
    part."""
    folder = data_set(name)
    text = "text" if name == "banking77" else "sentence"
    train = read_rows(folder / "train.jsonl.gz")
    if name == "financial_phrasebank":
        train, test = train[:3200], train[3200:]
    else:
        test = read_rows(folder / "test.jsonl")
    return tuple([{"text": row[text], "label": int(row["label"])} for row in part] for part in (train, test))  # type: ignore[return-value]


class Task:
    """One data set, tokenised once."""

    def __init__(self, name: str, *, num_eval: int) -> None:
        self.name = name
        self.tokenizer = AutoTokenizer.from_pretrained(minilm())
        train, test = rows_of(name)
        self.num_labels = 1 + max(row["label"] for row in train)
        self.train, self.test = self._encode(train), self._encode(test[:num_eval])

    def _encode(self, rows: Sequence[dict]) -> list[dict]:
        ids = self.tokenizer([row["text"] for row in rows], truncation=True, max_length=TOKENS)
        return [
            {"input_ids": i, "attention_mask": m, "labels": row["label"]}
            for i, m, row in zip(ids["input_ids"], ids["attention_mask"], rows, strict=True)
        ]

    def model(self, seed: int) -> PreTrainedModel:
        """MiniLM with a new classifier."""
        set_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=self.num_labels)

    def batches(self, num_rows: int) -> list[dict[str, torch.Tensor]]:
        """Calibration batches without labels."""
        collate = DataCollatorWithPadding(self.tokenizer)
        rows = [{k: v for k, v in row.items() if k != "labels"} for row in self.train[:num_rows]]
        return [dict(collate(rows[start : start + 32])) for start in range(0, len(rows), 32)]

    def trainer(self, model: Any, *, steps: int, rate: float, seed: int, **more: Any) -> Trainer:
        """Stock Trainer with this suite's settings."""
        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(prefix="gradpruner-"),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=64,
            learning_rate=rate,
            warmup_steps=0.1,
            lr_scheduler_type="linear",
            weight_decay=0.01,
            seed=seed,
            report_to=[],
            save_strategy="no",
            logging_steps=1000,
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        collate = DataCollatorWithPadding(self.tokenizer)
        return Trainer(
            model,
            arguments,
            train_dataset=self.train,
            eval_dataset=self.test,
            data_collator=collate,
            compute_metrics=lambda out: {
                "accuracy": float((out.predictions.argmax(-1) == out.label_ids).mean())
            },
            **more,
        )


def score(task: Task, seed: int, folder: Path, *, score_steps: int, steps: int) -> None:
    """Scoring run of LoRA; kept in ``folder``."""
    if (folder / "seconds.json").is_file():
        return
    config = GradPrunerConfig(num_steps=score_steps)
    callback = GradPrunerCallback(config)
    model = get_peft_model(
        task.model(seed), LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS")
    )
    trainer = task.trainer(model, steps=steps, rate=1e-3, seed=seed, callbacks=[callback])
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    callback.save(folder)
    write_json(folder / "seconds.json", {"cpu_seconds": seconds})


def plan_of(task: Task, method: str, n: int, seed: int, folder: Path) -> PruningPlan:
    """What a method drops."""
    if method.startswith("gradpruner"):
        merge = 0 if "only" in method else None
        return plan_pruning(read_scores(folder).scores(), n_prune=n, n_merge=merge)
    config = GradPrunerConfig(method=method, n_prune=n, plan_seed=seed)  # type: ignore[arg-type]
    return baseline_plan(task.model(seed), config, task.batches(64))


def run_file(plan: PruningPlan | None, folder: Path) -> Path:
    """Where the result of one model lies; methods that choose the same layers share it."""
    key = "dense" if plan is None else "drop" + "".join(map(str, plan.dropped))
    if plan is not None and plan.merged:
        key += f"_{plan.rule}" + "_".join(f"{d}to{r}" for d, r in plan.merged)
    return folder / f"{key}.json"


def train(task: Task, plan: PruningPlan | None, seed: int, folder: Path, *, steps: int) -> dict[str, Any]:
    """Fine-tune one model, short or whole; or read what an equal run left."""
    path = run_file(plan, folder)
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    model = task.model(seed)
    if plan is not None:
        history = GradientHistory.open(folder / "scores" / HISTORY_FOLDER) if plan.merged else None
        prune_model(model, plan, history=history)
    trainer = task.trainer(model, steps=steps, rate=3e-4, seed=seed)
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    params = sum(p.numel() for p in model.parameters())
    result = {
        "accuracy": trainer.evaluate()["eval_accuracy"],
        "cpu_seconds": seconds,
        "params": params,
        "plan": None if plan is None else plan.to_dict(),
    }
    write_json(path, result)
    print(f"{task.name} seed {seed} {path.stem}: {result['accuracy']:.3f} in {seconds:.0f} s", flush=True)
    return result


def measure(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Run (or read) everything: ``set/seed`` -> ``dense`` or ``removed/method`` -> result.

    Seeds are outermost, so a run that was cut off still holds whole seeds.
    """
    tasks = {name: Task(name, num_eval=args.num_eval) for name in args.sets}
    found: dict[str, dict[str, Any]] = {}
    for seed, name in itertools.product(args.seeds, args.sets):
        task, folder = tasks[name], args.work / f"{args.steps}_{args.score_steps}" / name / f"seed{seed}"
        if args.finished_only and not (folder / "dense.json").is_file():
            continue
        score(task, seed, folder / "scores", score_steps=args.score_steps, steps=args.steps)
        cell = found[f"{name}/{seed}"] = {"dense": train(task, None, seed, folder, steps=args.steps)}
        cell["dense"]["score_seconds"] = json.loads((folder / "scores" / "seconds.json").read_text())[
            "cpu_seconds"
        ]
        for n, method in itertools.product(args.removed, METHODS):
            plan = plan_of(task, method, n, seed, folder / "scores")
            if args.finished_only and not run_file(plan, folder).is_file():
                continue
            cell[f"{n}/{method}"] = train(task, plan, seed, folder, steps=args.steps)
    return found


def table(found: dict[str, dict[str, Any]], removed: Sequence[int], sets: Sequence[str]) -> list[list[str]]:
    """Accuracy of each set, change against the dense model of equal set and seed, time and size."""
    rows = []
    for n, method in [(0, "dense"), *((n, method) for n in removed for method in METHODS)]:
        key = "dense" if n == 0 else f"{n}/{method}"
        pairs = {place: (cell[key], cell["dense"]) for place, cell in found.items() if key in cell}
        if not pairs:
            continue
        line = [str(n), method]
        for name in sets:
            values = [
                100 * run["accuracy"] for place, (run, _) in pairs.items() if place.startswith(f"{name}/")
            ]
            line.append(mean_and_deviation(values))
        change = [100 * (run["accuracy"] / dense["accuracy"] - 1) for run, dense in pairs.values()]
        ratio = [100 * run["cpu_seconds"] / dense["cpu_seconds"] for run, dense in pairs.values()]
        line.append("" if n == 0 else f"{mean_and_deviation(change)} ({len(change)})")
        line += [
            f"{statistics.median(ratio):.0f} %",
            f"{16 * next(iter(pairs.values()))[0]['params'] / 1e6:.0f} MB",
        ]
        rows.append(line)
    return rows


def mean_and_deviation(values: Sequence[float]) -> str:
    """``mean +/- standard deviation``; a single value alone."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} +/- {statistics.stdev(values):.1f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the result file, print one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=80, help="fine-tuning steps of each model")
    parser.add_argument("--score-steps", type=int, default=16, help="LoRA steps that are scored")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--removed", type=int, nargs="+", default=[2, 3, 1], help="layers to drop, in this order"
    )
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--finished-only", action="store_true", help="report what is there, train nothing")
    parser.add_argument("--num-eval", type=int, default=500, help="test rows of each set")
    parser.add_argument("--work", type=Path, default=WORK, help="where finished runs are kept")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--short", action="store_true", help="a few steps of one set, result not kept")
    args = parser.parse_args(argv)
    if args.short:
        args.steps, args.score_steps, args.num_eval, args.seeds, args.removed, args.sets = (
            4,
            4,
            32,
            [0],
            [2],
            ["sst2"],
        )
        args.out = args.work = Path(tempfile.mkdtemp(prefix="benchmark-"))
    torch.set_num_threads(1)
    found = measure(args)
    share = [100 * cell["dense"]["score_seconds"] / cell["dense"]["cpu_seconds"] for cell in found.values()]
    seeds = sorted({int(place.split("/")[1]) for place in found})
    path = write_result(
        "gradpruner_text",
        command=f"python -m benchmarks.gradpruner_text --steps {args.steps} --score-steps {args.score_steps} "
        f"--sets {' '.join(args.sets)} --removed {' '.join(map(str, args.removed))} "
        f"--num-eval {args.num_eval}",
        config={
            "steps": args.steps,
            "score_steps": args.score_steps,
            "batch": BATCH,
            "tokens": TOKENS,
            "num_eval": args.num_eval,
            "learning_rate": 3e-4,
            "score_learning_rate": 1e-3,
            "gradpruner": "keep 0.2, merges what goes beyond 10/32 of the layers",
        },
        seeds=seeds,
        packages=("transformers", "peft"),
        columns=[
            "layers removed of 6",
            "method",
            *args.sets,
            "against dense, relative % (models)",
            "training time of dense",
            "weights, gradients, Adam",
        ],
        rows=table(found, sorted(args.removed), args.sets),
        notes=[
            f"Accuracy in % on {args.num_eval} test rows, mean and standard deviation over seeds; all models "
            f"train {args.steps} steps of {BATCH} rows after pruning, with equal data and settings. The "
            "relative change is paired by set and seed, mean and standard deviation over all pairs.",
            "Time is CPU time of training, median over pairs, without the scoring run, which takes "
            f"{statistics.median(share):.0f} % of a dense run of this (very short) length; memory is 16 "
            "bytes a weight.",
        ],
        details=found,
        folder=args.out,
    )
    print(json.dumps({"benchmark": "gradpruner_text", "result": path.name}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
