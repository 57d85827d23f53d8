"""40 % of the layers of a small Llama removed before it is fine-tuned on GSM8K: GradPruner against every
baseline.

``python -m benchmarks.gradpruner_lm`` takes the 10-layer model of ``tools/small_lm.py`` (pre-trained on real
text without GSM8K), scores it with LoRA steps, drops 4 layers by each method, fine-tunes for equal steps,
and measures perplexity and next-token accuracy on the answers of test problems. Finished runs are kept in
``work_dirs/gradpruner_lm``. Writes ``docs/results/gradpruner_lm.json``.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
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
from tools.real_data import data_set, read_rows

ROOT = Path(__file__).resolve().parent.parent
MERGES = {"gradpruner": None, "gradpruner, all merged": "all", "gradpruner, dropped only": 0}
METHODS = (*MERGES, "reverse", "random", "block_influence", "laco", "magnitude")
RATIO, BATCH, TOKENS = 0.4, 8, 128


class Task:
    """GSM8K for one model."""

    def __init__(self, folder: Path, *, num_eval: int, tiny: bool) -> None:
        self._folder, self._tiny = folder, tiny
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        gsm8k = data_set("gsm8k")
        self.train = [self._encode(row) for row in read_rows(gsm8k / "train.jsonl.gz")]
        self.test = [self._encode(row) for row in read_rows(gsm8k / "test.jsonl.gz")[:num_eval]]

    def _encode(self, row: dict[str, str]) -> dict[str, list[int]]:
        question = self.tokenizer(row["question"] + "\n", add_special_tokens=False)["input_ids"]
        answer = self.tokenizer(row["answer"], add_special_tokens=False)["input_ids"] + [
            self.tokenizer.eos_token_id
        ]
        ids = (question + answer)[:TOKENS]
        return {
            "input_ids": ids,
            "labels": ([-100] * len(question) + answer)[:TOKENS],
            "attention_mask": [1] * len(ids),
        }

    def model(self) -> PreTrainedModel:
        """The pre-trained model; a random one of the same depth under ``--short``."""
        if self._tiny:
            set_seed(0)
            return LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=4096,
                    hidden_size=32,
                    intermediate_size=64,
                    num_hidden_layers=10,
                    num_attention_heads=2,
                    num_key_value_heads=2,
                )
            )
        return AutoModelForCausalLM.from_pretrained(self._folder)

    def collate(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        """Pad to the longest row."""
        return dict(DataCollatorForSeq2Seq(self.tokenizer)(list(rows)))

    def batches(self, num_rows: int) -> list[dict[str, torch.Tensor]]:
        """Calibration batches without labels."""
        rows = [{k: v for k, v in row.items() if k != "labels"} for row in self.train[:num_rows]]
        return [
            dict(self.tokenizer.pad(rows[i : i + 16], return_tensors="pt")) for i in range(0, num_rows, 16)
        ]

    def trainer(self, model: Any, *, steps: int, rate: float, seed: int, **more: Any) -> Trainer:
        """Stock Trainer."""
        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(prefix="gradpruner-"),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=rate,
            warmup_steps=0.05,
            lr_scheduler_type="cosine",
            weight_decay=0.1,
            seed=seed,
            report_to=[],
            save_strategy="no",
            logging_steps=1000,
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        return Trainer(model, arguments, train_dataset=self.train, data_collator=self.collate, **more)

    @torch.no_grad()
    def evaluate(self, model: PreTrainedModel) -> dict[str, float]:
        """Perplexity and next-token accuracy over all answer tokens of the test rows."""
        model.eval()
        loss, right, count = 0.0, 0, 0
        for start in range(0, len(self.test), 32):
            batch = self.collate(self.test[start : start + 32])
            logits, labels = (
                model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1],
                batch["labels"][:, 1:],
            )
            wanted = labels != -100
            loss += float(
                torch.nn.functional.cross_entropy(logits[wanted].float(), labels[wanted], reduction="sum")
            )
            right += int((logits.argmax(-1) == labels)[wanted].sum())
            count += int(wanted.sum())
        return {"perplexity": math.exp(loss / count), "accuracy": right / count}


def score(task: Task, seed: int, folder: Path, *, score_steps: int, steps: int) -> None:
    """Scoring run of LoRA; kept in ``folder``."""
    if (folder / "seconds.json").is_file():
        return
    callback = GradPrunerCallback(GradPrunerConfig(num_steps=score_steps))
    set_seed(seed)
    model = get_peft_model(task.model(), LoraConfig(r=8, lora_alpha=32, target_modules="all-linear"))
    trainer = task.trainer(model, steps=steps, rate=1e-3, seed=seed, callbacks=[callback])
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    callback.save(folder)
    write_json(folder / "seconds.json", {"cpu_seconds": seconds})


def plan_of(task: Task, method: str, seed: int, folder: Path) -> PruningPlan:
    """What a method drops; protection of the first and last layer holds for all."""
    if method in MERGES:
        return plan_pruning(read_scores(folder).scores(), ratio=RATIO, n_merge=MERGES[method])
    config = GradPrunerConfig(method=method, ratio=RATIO, plan_seed=seed)  # type: ignore[arg-type]
    return baseline_plan(task.model(), config, task.batches(64))


def train(
    task: Task, plan: PruningPlan | None, seed: int, folder: Path, *, steps: int, finished_only: bool = False
) -> dict[str, Any] | None:
    """Fine-tune one model, or read what an equal run left."""
    key = "dense" if plan is None else "drop" + "_".join(map(str, plan.dropped))
    if plan is not None and plan.merged:
        key += f"_{plan.rule}" + "_".join(f"{d}to{r}" for d, r in plan.merged)
    path = folder / f"{key}.json"
    if path.is_file() or finished_only:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    model = task.model()
    if plan is not None:
        history = (
            GradientHistory.open(folder / "scores" / HISTORY_FOLDER) if plan.rule == "same_sign" else None
        )
        prune_model(model, plan, history=history if plan.merged else None)
    before = task.evaluate(model)
    trainer = task.trainer(model, steps=steps, rate=1e-3, seed=seed)
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    result = task.evaluate(model) | {
        "perplexity_before": before["perplexity"],
        "cpu_seconds": seconds,
        "params": sum(p.numel() for p in model.parameters()),
        "plan": None if plan is None else replace(plan, scores=()).to_dict(),
    }
    write_json(path, result)
    print(
        f"seed {seed} {key}: {result['perplexity']:.2f}, {result['accuracy']:.4f} in {seconds:.0f} s",
        flush=True,
    )
    return result


def measure(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Run (or read) everything: seed -> method -> result."""
    task = Task(args.model, num_eval=args.num_eval, tiny=args.short)
    found: dict[str, dict[str, Any]] = {}
    for seed in args.seeds:
        folder = args.work / f"{args.steps}_{args.score_steps}" / f"seed{seed}"
        if args.finished_only and not (folder / "dense.json").is_file():
            continue
        score(task, seed, folder / "scores", score_steps=args.score_steps, steps=args.steps)
        plans = {method: plan_of(task, method, seed, folder / "scores") for method in args.methods}
        runs = {
            name: train(task, plan, seed, folder, steps=args.steps, finished_only=args.finished_only)
            for name, plan in {"dense": None, **plans}.items()
        }
        found[str(seed)] = {name: run for name, run in runs.items() if run is not None}
    return found


def table(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """One row a method; changes are paired by seed."""
    rows = []
    for method in ("dense", *METHODS):
        pairs = [(seed[method], seed["dense"]) for seed in found.values() if method in seed]
        if not pairs:
            continue
        runs, dense = [run for run, _ in pairs], [whole for _, whole in pairs]
        change = [
            100 * (run["accuracy"] / whole["accuracy"] - 1) for run, whole in zip(runs, dense, strict=True)
        ]
        dropped = {"-".join(map(str, run["plan"]["dropped"])) if run["plan"] else "" for run in runs}
        times = [run["cpu_seconds"] / whole["cpu_seconds"] for run, whole in zip(runs, dense, strict=True)]
        rows.append(
            [
                method,
                ", ".join(sorted(dropped)),
                f"{statistics.mean(run['perplexity_before'] for run in runs):.3g}",
                _spread([run["perplexity"] for run in runs], 2),
                _spread([100 * run["accuracy"] for run in runs], 2),
                _change(change) if method != "dense" else "",
                f"{100 * statistics.median(times):.0f} %",
                f"{runs[0]['params'] / 1e6:.2f} M",
            ]
        )
    return rows


def _change(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):+.1f} ({min(values):+.1f} to {max(values):+.1f}; {len(values)})"


def _spread(values: Sequence[float], digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} +/- {deviation:.{digits}f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the result file, print one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, default=ROOT / "work_dirs" / "small_lm", help="what small_lm.py wrote"
    )
    parser.add_argument("--steps", type=int, default=30, help="fine-tuning steps of each model")
    parser.add_argument("--score-steps", type=int, default=12, help="LoRA steps that are scored")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--finished-only", action="store_true", help="report what is there, train nothing")
    parser.add_argument("--num-eval", type=int, default=64, help="test problems")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "work_dirs" / "gradpruner_lm", help="finished runs"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument(
        "--short", action="store_true", help="a tiny random model, a few steps, result not kept"
    )
    args = parser.parse_args(argv)
    if args.short:
        args.steps, args.score_steps, args.num_eval, args.seeds = 4, 4, 8, [0]
        args.out = args.work = Path(tempfile.mkdtemp(prefix="benchmark-"))
    torch.set_num_threads(1)
    found = measure(args)
    path = write_result(
        "gradpruner_lm",
        command=f"python -m benchmarks.gradpruner_lm --steps {args.steps} --score-steps {args.score_steps} "
        f"--num-eval {args.num_eval}",
        config={
            "model": "tools/small_lm.py, 10 layers",
            "ratio": RATIO,
            "steps": args.steps,
            "batch": BATCH,
            "score_steps": args.score_steps,
            "learning_rate": 1e-3,
            "num_eval": args.num_eval,
        },
        seeds=[int(seed) for seed in found],
        packages=("transformers", "peft"),
        columns=[
            "method",
            "layers dropped (each choice over seeds)",
            "perplexity before training",
            "perplexity of answers",
            "next-token accuracy of answers, %",
            "accuracy against dense, relative (range)",
            "training time of dense",
            "weights",
        ],
        rows=table(found),
        notes=[
            f"GSM8K answers of {args.num_eval} test problems, rows cut at {TOKENS} tokens; mean and standard "
            f"deviation over seeds; {args.steps} steps of {BATCH} problems after pruning, full fine-tuning, "
            "equal data and settings. Time is CPU time.",
            "The paper: 13 of 32 layers of Llama-3.1-8B and Mistral-7B, 3 of them merged, mean relative "
            "change of accuracy -0.99 % after three epochs on eight tasks; a model of 5 M weights has far "
            "less redundancy.",
        ],
        details=found,
        folder=args.out,
    )
    print(json.dumps({"benchmark": "gradpruner_lm", "result": path.name}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
