"""Forgetting against downstream quality: a small language model, pre-trained on real text, is fine-tuned on
GSM8K, and its task vector is pruned by FAPM and by the methods it is compared with, over a grid of keeps.

``python -m benchmarks.fapm_forgetting --model work_dirs/small_lm`` (made by ``python tools/small_lm.py``)
takes about 12 minutes on one core; a finished fine-tuning or evaluation is not repeated. ``--short`` uses the
text of this repository and a model of some thousand weights. Prints one JSON line and writes
``docs/results/fapm_forgetting.json`` and a picture next to it.
"""

import argparse
import json
import math
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from benchmarks.record import RESULTS, write_result
from hf_plugins.fapm import FAPMConfig, fapm_prune_checkpoint
from tools.real_data import ROOT, data_set, read_rows
from tools.small_lm import blocks, heldout_blocks, perplexity, train_tokenizer

GRID = {
    "fapm": (0.05, 0.1, 0.2, 0.4),
    "magnitude": (0.05, 0.1, 0.2),
    "ties": (0.1, 0.2),
    "dare": (0.2,),
    "relative": (0.4,),
    "wise_ft": (0.1, 0.25, 0.5),
}
LABELS = {
    "fapm": "FAPM",
    "magnitude": "magnitude (per tensor)",
    "ties": "TIES-trim (global magnitude)",
    "dare": "DARE",
    "relative": "relative change only",
    "wise_ft": "WiSE-FT (keep is alpha)",
}
Pairs = list[tuple[list[int], list[int]]]


def gsm8k(split: str) -> list[tuple[str, str]]:
    """Prompts and answers of GSM8K as text."""
    rows = read_rows(data_set("gsm8k") / f"{split}.jsonl.gz")
    return [(f"Question: {row['question']}\nAnswer:", f" {row['answer']}") for row in rows]


def repository_texts() -> tuple[list[str], list[tuple[str, str]]]:
    """For ``--short``: prose of the documents as pre-training text, program lines as the downstream task."""
    prose = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
    code = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "hf_plugins").glob("*.py"))]
    lines = [text.split("\n") for text in code]
    halves = [
        ("\n".join(part[:8]), "\n" + "\n".join(part[8:16]))
        for text in lines
        for part in (text[start : start + 16] for start in range(0, len(text), 16))
        if len(part) > 12
    ]
    return prose, halves


def trainer(
    model: torch.nn.Module, rows: Tensor, folder: Path, *, steps: int, rate: float, seed: int
) -> Trainer:
    """The stock Trainer on rows of token ids."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    ids = rows[order].tolist()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        bf16=True,
        logging_steps=25,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
    )
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    return Trainer(model=model, args=arguments, train_dataset=data, data_collator=default_data_collator)


def fine_tune(base: Path, rows: Tensor, folder: Path, *, steps: int, rate: float, seed: int) -> Path:
    """Fine-tune all weights of the base model into ``folder``, unless it is there already."""
    done = folder / "finished.json"
    settings = {"steps": steps, "rate": rate, "seed": seed}
    if done.is_file() and json.loads(done.read_text(encoding="utf-8")) == settings:
        return folder
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    trainer(model, rows, folder / "trainer", steps=steps, rate=rate, seed=seed).train()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    done.write_text(json.dumps(settings), encoding="utf-8")
    return folder


def encode(tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]], limit: int) -> Pairs:
    """Token ids of prompts and answers; pairs longer than 512 tokens are left out."""
    found = []
    for prompt, answer in pairs:
        left, right = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
        if len(left) + len(right) <= 512:
            found.append((left, [*right, tokenizer.eos_token_id]))
    return found[:limit]


@torch.no_grad()
def answer_quality(model: torch.nn.Module, pairs: Pairs, *, batch_size: int = 8) -> tuple[float, float]:
    """Perplexity and next-token accuracy on the answers alone, the prompt given."""
    model.eval()
    loss, right, count = 0.0, 0, 0
    ordered = sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))
    for first in range(0, len(ordered), batch_size):
        batch = ordered[first : first + batch_size]
        width = max(len(a) + len(b) for a, b in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        labels = torch.full((len(batch), width), -100)
        for row, (a, b) in enumerate(batch):
            # Padding stands right of the text; a causal model never sees it.
            ids[row, : len(a) + len(b)] = torch.tensor(a + b)
            labels[row, len(a) : len(a) + len(b)] = torch.tensor(b)
        logits, target = model(input_ids=ids).logits[:, :-1].float(), labels[:, 1:]
        loss += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), target.flatten(), ignore_index=-100, reduction="sum"
        ).item()
        right += int((logits.argmax(-1) == target).sum())
        count += int((target != -100).sum())
    return math.exp(loss / count), right / count


def evaluate(folder: Path, heldout: Tensor, pairs: Pairs) -> dict[str, float]:
    """Four figures of one model: pre-training text and downstream answers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    general_ppl, general_acc = perplexity(model, heldout)
    task_ppl, task_acc = answer_quality(model, pairs)
    return {
        "general_ppl": general_ppl,
        "general_acc": general_acc,
        "task_ppl": task_ppl,
        "task_acc": task_acc,
    }


def run_seed(
    work: Path,
    base: Path,
    rows: Tensor,
    heldout: Tensor,
    pairs: Pairs,
    *,
    steps: int,
    rate: float,
    seed: int,
    grid: dict,
) -> dict[str, dict[str, float]]:
    """Fine-tune once, then measure every method at every keep; what is measured is kept in a file."""
    folder = work / f"seed{seed}"
    tuned = fine_tune(base, rows, folder / "tuned", steps=steps, rate=rate, seed=seed)
    store = folder / "figures.json"
    found = json.loads(store.read_text(encoding="utf-8")) if store.is_file() else {}

    def measure(label: str, model: Path) -> None:
        found[label] = evaluate(model, heldout, pairs)
        store.write_text(json.dumps(found, indent=1), encoding="utf-8")

    for label, model in (("base", base), ("full", tuned)):
        if label not in found:
            measure(label, model)
    for method, keeps in grid.items():
        for keep in keeps:
            label = f"{method} {keep:g}"
            if label in found:
                continue
            out = folder / "pruned"
            shutil.rmtree(out, ignore_errors=True)
            config = FAPMConfig(method=method, keep=keep, seed=seed, sync=False)
            report = fapm_prune_checkpoint(base, tuned, out, config)
            measure(label, out)
            found[label]["effective_density"] = report["totals"]["effective_density"]
            store.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def shares(figures: dict[str, dict[str, float]], label: str) -> dict[str, float]:
    """The paper's two figures, and their perplexity forms.

    ``forgetting`` is what next-token accuracy on pre-training text lost, relative to the base; ``retained``
    is the share of the fine-tuned model's answer accuracy that is left; ``gain`` counts from the base, so
    that the base has 0 and the fine-tuned model 1 (in log perplexity of the answers).
    """
    base, full, here = figures["base"], figures["full"], figures[label]
    log_gain = math.log(base["task_ppl"]) - math.log(full["task_ppl"])
    return {
        "forgetting": 1 - here["general_acc"] / base["general_acc"],
        "general_log_ppl": math.log(here["general_ppl"]) - math.log(base["general_ppl"]),
        "retained": here["task_acc"] / full["task_acc"],
        "gain": (math.log(base["task_ppl"]) - math.log(here["task_ppl"])) / log_gain,
        "general_ppl": here["general_ppl"],
        "task_ppl": here["task_ppl"],
    }


def gain_at(curve: list[tuple[float, float]], cost: float) -> float:
    """Gain of a method where its rise in log perplexity is ``cost``, on straight lines between its points."""
    points = sorted(curve)
    for (x0, y0), (x1, y1) in zip(points[:-1], points[1:], strict=True):
        if x0 <= cost <= x1:
            return y0 + (y1 - y0) * (cost - x0) / max(x1 - x0, 1e-12)
    return math.nan


def table(runs: list[dict], grid: dict) -> tuple[list[list[str]], dict[str, list[dict[str, float]]]]:
    """Rows for the docs, mean with the smallest and largest seed, and the raw shares of each label."""
    labels = ["base", "full", *(f"{method} {keep:g}" for method, keeps in grid.items() for keep in keeps)]
    raw = {label: [shares(run, label) for run in runs] for label in labels}

    def cell(label: str, key: str, form: str) -> str:
        values = [each[key] for each in raw[label]]
        return f"{statistics.fmean(values):{form}} ({min(values):{form}} to {max(values):{form}})"

    rows = []
    for label in labels:
        method, _, keep = label.partition(" ")
        name = {"base": "pre-trained model", "full": "full fine-tuning"}.get(method) or LABELS[method]
        cells = [
            ("forgetting", ".2%"),
            ("general_ppl", ".1f"),
            ("retained", ".1%"),
            ("gain", ".2f"),
            ("task_ppl", ".1f"),
        ]
        rows.append([name, keep or "-", *(cell(label, key, form) for key, form in cells)])
    return rows, raw


def draw(raw: dict[str, list[dict[str, float]]], grid: dict, path: Path) -> None:
    """Forgetting against what was learnt, a line a method; every seed is a dot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.8))
    colours = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
    for colour, (method, keeps) in zip(colours, grid.items(), strict=True):
        means = []
        for label in ["base", *(f"{method} {keep:g}" for keep in keeps), "full"]:
            x = [each["general_log_ppl"] for each in raw[label]]
            y = [each["gain"] for each in raw[label]]
            means.append((statistics.fmean(x), statistics.fmean(y)))
            axes.scatter(x, y, s=9, color=colour, alpha=0.5, linewidths=0)
        if method == "relative":
            means = means[1:-1]
        axes.plot(*zip(*means, strict=True), color=colour, marker="o", markersize=4, label=LABELS[method])
    axes.set_xlabel("forgetting: rise of log perplexity on held-out pre-training text")
    axes.set_ylabel("learnt: share of the fine-tuning's gain on answers")
    axes.set_title("Up and left is better; dots are seeds")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def short_base(folder: Path) -> tuple[Path, Tensor, list[tuple[str, str]]]:
    """A tiny model trained for seconds on this repository's documents, with held-out rows and pairs."""
    prose, halves = repository_texts()
    tokenizer = train_tokenizer(prose)
    rows = blocks(tokenizer, prose)
    set_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **size)
    model = LlamaForCausalLM(config)
    trainer(model, rows[:-4], folder / "trainer", steps=20, rate=1e-2, seed=0).train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, rows[-4:], halves


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the result file and the picture, print one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, default=ROOT / "work_dirs" / "small_lm", help="the base model's folder"
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "work_dirs" / "fapm_forgetting", help="for what is made"
    )
    parser.add_argument(
        "--steps", type=int, default=100, help="optimizer steps of fine-tuning, 8 x 256 tokens each"
    )
    parser.add_argument("--rate", type=float, default=5e-4, help="peak learning rate")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--blocks", type=int, default=32, help="held-out rows of 256 tokens that are measured"
    )
    parser.add_argument("--answers", type=int, default=40, help="answers of the test split that are measured")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument(
        "--short", action="store_true", help="tiny model and text of this repository, not kept"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    grid = GRID
    if args.short:
        args.work = args.out = Path(tempfile.mkdtemp(prefix="benchmark-"))
        args.steps, args.rate, args.seeds = 10, 5e-3, [0]
        grid = {method: keeps[-1:] for method, keeps in GRID.items()}
        args.model, heldout, halves = short_base(args.work / "base")
        train, test = halves[:-8], halves[-8:]
    else:
        train, test = gsm8k("train"), gsm8k("test")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if not args.short:
        heldout = heldout_blocks(args.model, tokenizer)
        heldout = heldout[:: max(1, len(heldout) // args.blocks)][: args.blocks]
    rows = blocks(tokenizer, [prompt + answer for prompt, answer in train])
    pairs = encode(tokenizer, test, args.answers)
    settings = {"steps": args.steps, "rate": args.rate}
    runs = [
        run_seed(args.work, args.model, rows, heldout, pairs, **settings, seed=seed, grid=grid)
        for seed in args.seeds
    ]
    cells, raw = table(runs, grid)
    draw(raw, grid, args.out / "fapm_forgetting.svg")
    # Gains are compared where forgetting is equal: at a tenth and at half of what fine-tuning cost.
    full_cost = statistics.fmean(each["general_log_ppl"] for each in raw["full"])
    equal_cost = {}
    for share in (0.1, 0.25, 0.5):
        for method in grid:
            labels = ["base", *(f"{method} {keep:g}" for keep in grid[method]), "full"]
            equal_cost[f"{method} at {share:g}"] = [
                gain_at(
                    [(raw[label][i]["general_log_ppl"], raw[label][i]["gain"]) for label in labels],
                    share * full_cost,
                )
                for i in range(len(args.seeds))
            ]
    path = write_result(
        "fapm_forgetting",
        command=f"python -m benchmarks.fapm_forgetting --steps {args.steps} --rate {args.rate:g} "
        f"--blocks {args.blocks} --answers {args.answers}",
        config={
            **settings,
            "model": args.model.name,
            "heldout_tokens": heldout.numel(),
            "answers": len(pairs),
            "training_rows": len(rows),
            "threads": args.threads,
        },
        seeds=args.seeds,
        packages=("transformers",),
        columns=[
            "method",
            "keep",
            "forgetting (accuracy lost on pre-training text)",
            "perplexity of pre-training text",
            "answer accuracy left",
            "gain kept (0 = base, 1 = fine-tuned)",
            "perplexity of answers",
        ],
        rows=cells,
        notes=["Mean, and smallest to largest over seeds. Accuracy is of the next token, the prompt given."],
        details={
            "runs": dict(zip(map(str, args.seeds), runs, strict=True)),
            "gain_at_equal_forgetting": equal_cost,
        },
        folder=args.out,
    )
    print(
        json.dumps(
            {"benchmark": "fapm_forgetting", "result": path.name, "gain_at_equal_forgetting": equal_cost}
        )
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
