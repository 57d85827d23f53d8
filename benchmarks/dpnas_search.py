"""Does the controller find better cells than uniform draws for the same work? A small search on MNIST.

For each seed: a search with the controller and one with uniform draws, on the same images and with the same
number of DP-SGD steps; what the controller spends on rewards the other spends on more candidates. Then the
best cell of each, one cell drawn at random and the released one are trained alike from scratch, on other
images, and scored on test images. Every part is kept in ``--work-dir`` and not repeated; a search that was
interrupted goes on.

Writes ``docs/results/dpnas_search.json`` with the seeds of which every part is finished.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from benchmarks.record import write_result
from hf_plugins.dp import DPConfig
from hf_plugins.dpnas.agent import search
from hf_plugins.dpnas.config import DPNASSearchConfig
from hf_plugins.dpnas.dataset import load_images
from hf_plugins.dpnas.genotypes import RELEASED, Genotype, random_genotype
from hf_plugins.dpnas.model import DPNASNetConfig, DPNASNetForImageClassification
from hf_plugins.dpnas.trainer import ImageRecords, make_trainer
from hf_plugins.whole_files import write_json
from tools.real_data import data_set

ARMS = ("controller", "random search", "one random cell", "released cell")
DELTA = 1e-5


def search_options(strategy: str, seed: int, options: argparse.Namespace) -> DPNASSearchConfig:
    """Options of one search; both strategies read about the same number of images."""
    rewards = options.steps - options.warmup
    held = round(options.images * options.reward_split)
    # One candidate reads all of the reward split, one reward only a batch of it.
    more = round(rewards * options.batch / held) if strategy == "random" else 0
    return DPNASSearchConfig(
        shape="mnist",
        strategy=strategy,
        num_steps=options.steps,
        warmup_steps=options.warmup,
        reward_split=options.reward_split,
        sample_rate=options.batch / (options.images - held),
        reward_sample_rate=options.batch / held,
        noise_multiplier=0.8,
        learning_rate=0.1,
        final_learning_rate=0.01,
        controller_learning_rate=3.5e-3,
        num_candidates=options.candidates + more,
        save_steps=10,
        seed=seed,
    )


def kept(path: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result in ``path``, or what ``work`` gives, written there."""
    if not path.is_file():
        start = time.process_time()
        result = {**work(), "seconds": time.process_time() - start}
        write_json(path, result)
        print(path.stem, {k: v for k, v in result.items() if not isinstance(v, list)}, flush=True)
    return json.loads(path.read_text(encoding="utf-8"))


def run_search(strategy: str, seed: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One search on the first images."""
    images, labels = (part[: options.images] for part in load_images(data_set("mnist"), "train"))
    found = search(search_options(strategy, seed, options), images, labels, folder)
    rewards = [entry["reward"] for entry in found.journal]
    return {
        "operations": list(found.genotype.operations),
        "candidates": [score for _, score in found.candidates],
        "epsilon": found.epsilon,
        "rewards": rewards,
    }


def train_cell(cell: Genotype, seed: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One cell trained from scratch with DP, on images that no search saw."""
    train = load_images(data_set("mnist"), "train")
    first, last = options.images, options.images + options.train_images
    test = ImageRecords(*(part[: options.test_images] for part in load_images(data_set("mnist"), "t10k")))
    set_seed(seed)
    model = DPNASNetForImageClassification(DPNASNetConfig.preset("mnist", genotype=cell.triples()))
    chunk = min(64, options.train_batch)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=options.train_steps,
        per_device_train_batch_size=chunk,
        gradient_accumulation_steps=options.train_batch // chunk,
        per_device_eval_batch_size=250,
        learning_rate=2.0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=seed,
        disable_tqdm=True,
    )
    dp = DPConfig(target_epsilon=3.0, delta=DELTA, max_grad_norm=0.1, seed=seed)
    records = ImageRecords(*(part[first:last] for part in train))
    trainer = make_trainer(model, arguments, dp, records, test)
    trainer.train()
    return {
        "accuracy": trainer.evaluate()["eval_accuracy"],
        "epsilon": trainer.epsilon(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "cell": cell.describe(),
    }


def run_seed(seed: int, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All parts of one seed."""
    folder = options.work_dir / (
        f"{options.steps}x{options.batch}_{options.images}_{options.train_steps}x{options.train_batch}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    searches = {
        strategy: kept(
            folder / f"search_{strategy}_{seed}.json",
            lambda strategy=strategy: run_search(strategy, seed, folder / f"{strategy}_{seed}", options),
        )
        for strategy in ("controller", "random")
    }
    generator = torch.Generator().manual_seed(1000 + seed)
    cells = (
        Genotype(tuple(searches["controller"]["operations"])),
        Genotype(tuple(searches["random"]["operations"])),
        random_genotype(generator),
        RELEASED["mnist"],
    )
    trained = {
        arm: kept(
            folder / f"train_{arm.replace(' ', '_')}_{seed}.json",
            lambda cell=cell: train_cell(cell, seed, folder / "trainer", options),
        )
        for arm, cell in zip(ARMS, cells, strict=True)
    }
    return {f"search, {strategy}": found for strategy, found in searches.items()} | trained


def spread_of(values: Sequence[float], scale: float = 100.0) -> str:
    """Mean with the standard deviation over seeds."""
    text = f"{scale * statistics.mean(values):.1f}"
    return text if len(values) < 2 else f"{text} +/- {scale * statistics.stdev(values):.1f}"


def report(found: dict[int, dict[str, dict[str, Any]]], options: argparse.Namespace) -> None:
    """Table over the seeds."""
    strategy_of = {"controller": "controller", "random search": "random"}
    rows = []
    for arm in ARMS:
        name = strategy_of.get(arm)
        looked = [run[f"search, {name}"] for run in found.values()] if name else []
        rows.append(
            [
                arm,
                spread_of([run[arm]["accuracy"] for run in found.values()]),
                " / ".join(f"{100 * run[arm]['accuracy']:.1f}" for run in found.values()),
                spread_of([statistics.mean(s["candidates"]) for s in looked]) if looked else "",
                f"{max(s['epsilon'] for s in looked):.2f}" if looked else "",
                f"{statistics.mean(s['seconds'] for s in looked) / 60:.1f}" if looked else "",
            ]
        )
    first = search_options("controller", 0, options)
    settings = {k: v for k, v in vars(options).items() if k not in ("work_dir", "short", "seeds")}
    write_result(
        "dpnas_search",
        command="python -m benchmarks.dpnas_search",
        config={**settings, "noise_multiplier": first.noise_multiplier, "reward_noise": 4.0, "delta": DELTA},
        seeds=sorted(found),
        packages=("transformers", "opacus", "dp-accounting"),
        columns=(
            "cell from",
            "test accuracy, %",
            "each seed, %",
            "candidates under shared weights, %",
            "epsilon of the search",
            "CPU minutes of the search",
        ),
        rows=rows,
        notes=[
            f"Search: {options.steps} DP-SGD steps of {options.batch} images (expected) out of "
            f"{options.images} of MNIST, {options.warmup} of them before the first reward; "
            f"{first.num_candidates} candidates at the end for the controller, "
            f"{search_options('random', 0, options).num_candidates} for random search, so that both read "
            "about as many images.",
            f"Then each cell alike: {options.train_steps} steps of {options.train_batch} out of "
            f"{options.train_images} other images at epsilon 3, scored on {options.test_images} test images; "
            "mean +/- standard deviation over seeds. The images are disjoint, so the larger epsilon holds.",
        ],
        details={str(seed): run for seed, run in found.items()},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/dpnas_search"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=10000, help="training images the search sees")
    parser.add_argument("--reward-split", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=150, help="weight steps of a search")
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--batch", type=int, default=64, help="expected batch of a search step")
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--train-images", type=int, default=15000)
    parser.add_argument("--train-steps", type=int, default=24)
    parser.add_argument("--train-batch", type=int, default=256)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--short", action="store_true", help="one tiny seed; writes no result")
    options = parser.parse_args(argv)
    if options.short:
        options.seeds, options.images, options.steps, options.warmup = [0], 200, 2, 1
        options.batch, options.candidates, options.train_images, options.train_steps = 8, 1, 64, 1
        options.train_batch, options.test_images = 16, 32
        options.work_dir = options.work_dir / "short"
    torch.set_num_threads(1)
    found = {}
    for seed in options.seeds:
        found[seed] = run_seed(seed, options)
        if not options.short:
            report(found, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
