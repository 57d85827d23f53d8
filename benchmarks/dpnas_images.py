"""DPNASNet against a plain tanh CNN at the same epsilon on real images: MNIST, and the subsets at hand of
FashionMNIST and CIFAR-10. Every arm trains through `DPTrainer`; a finished run is kept in ``--work-dir`` and
not repeated.

Writes ``docs/results/dpnas_images.json`` with every finished run that lies there, one row for each set,
network and settings.
"""

import argparse
import itertools
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments, set_seed
from transformers.modeling_outputs import ImageClassifierOutput

from benchmarks.record import write_result
from hf_plugins.dp import DPConfig
from hf_plugins.dpnas.dataset import load_images
from hf_plugins.dpnas.model import DPNASNetConfig, DPNASNetForImageClassification
from hf_plugins.dpnas.trainer import ImageRecords, make_trainer
from hf_plugins.whole_files import write_json
from tools.real_data import data_set

# data set -> (folder, preset, evaluation files, the paper's accuracy at epsilon 3, note)
SETS = {
    "MNIST": ("mnist", "mnist", "t10k", "98.57"),
    "FashionMNIST, 1,600 images": ("fashion_mnist_mini", "fashion_mnist", "test", "88.09 on 60,000"),
    "CIFAR-10, 15,000 JPEG images": ("cifar10_jpeg", "cifar10", "test", "68.33 on 50,000 original images"),
}


class TanhCNNConfig(PreTrainedConfig):
    """Shape of the control."""

    model_type = "tanh_cnn"

    def __init__(self, in_channels: int = 1, image_size: int = 28, **kwargs: object) -> None:
        self.in_channels, self.image_size = in_channels, image_size
        super().__init__(**kwargs)


class TanhCNNForImageClassification(PreTrainedModel):
    """The small tanh CNN of Papernot et al. 2021 (arXiv 2007.14191): two convolutions, two pools, two linear
    layers.
    """

    config_class = TanhCNNConfig
    main_input_name = "pixel_values"

    def __init__(self, config: TanhCNNConfig) -> None:
        super().__init__(config)
        self.features = nn.Sequential(
            nn.Conv2d(config.in_channels, 16, 8, stride=2, padding=3),
            nn.Tanh(),
            nn.MaxPool2d(2, 1),
            nn.Conv2d(16, 32, 4, stride=2),
            nn.Tanh(),
            nn.MaxPool2d(2, 1),
        )
        with torch.no_grad():
            picture = torch.zeros(1, config.in_channels, config.image_size, config.image_size)
            size = self.features(picture).numel()
        self.head = nn.Sequential(nn.Linear(size, 32), nn.Tanh(), nn.Linear(32, 10))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # PyTorch's defaults stay, as in the paper's code.
        return

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None
    ) -> ImageClassifierOutput:
        """Logits, and the mean cross entropy where labels are given."""
        logits = self.head(self.features(pixel_values).flatten(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


ARMS = ("DPNASNet", "tanh CNN")


def build(arm: str, preset: str) -> PreTrainedModel:
    """A fresh model of one arm."""
    shape = DPNASNetConfig.preset(preset)
    if arm == "DPNASNet":
        return DPNASNetForImageClassification(shape)
    return TanhCNNForImageClassification(TanhCNNConfig(shape.in_channels, shape.image_size, num_labels=10))


def train_once(name: str, arm: str, seed: int, folder: Path, options: argparse.Namespace) -> dict:
    """One training, or its kept result."""
    settings = {
        "epochs": options.epochs,
        "batch": options.batch,
        "learning_rate": options.learning_rate,
        "limit": options.limit,
        "epsilon": options.epsilon,
    }
    how = f"{options.epochs:g}x{options.batch}_lr{options.learning_rate:g}_eps{options.epsilon:g}"
    how += f"_{options.limit}" if options.limit else ""
    slug = f"{SETS[name][0]}_{arm.replace(' ', '_')}_{how}_{seed}"
    kept = folder / f"{slug}.json"
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    data, preset, evaluation, _ = SETS[name]
    images, labels = (part[: options.limit] for part in load_images(data_set(data), "train"))
    batch = min(options.batch, len(images) // 4)
    steps = round(options.epochs * len(images) / batch)
    set_seed(seed)
    model = build(arm, preset)
    physical = min(options.chunk, batch)
    arguments = TrainingArguments(
        output_dir=str(folder / slug),
        max_steps=steps,
        per_device_train_batch_size=physical,
        gradient_accumulation_steps=max(1, round(batch / physical)),
        learning_rate=options.learning_rate,
        per_device_eval_batch_size=256,
        save_steps=10,
        save_total_limit=1,
        report_to=[],
        seed=seed,
        logging_steps=20,
    )
    dp = DPConfig(target_epsilon=options.epsilon, delta=1e-5, max_grad_norm=0.1, seed=seed)
    test = ImageRecords(*load_images(data_set(data), evaluation))
    trainer = make_trainer(model, arguments, dp, ImageRecords(images, labels), test)
    start = time.process_time()
    last = sorted((folder / slug).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    trainer.train(resume_from_checkpoint=str(last[-1]) if last else None)
    result = {
        "set": name,
        "arm": arm,
        "seed": seed,
        "settings": settings,
        "accuracy": trainer.evaluate()["eval_accuracy"],
        "epsilon": trainer.ledger.epsilon(delta=1e-5),
        "noise_multiplier": trainer.noise_multiplier,
        "steps": steps,
        "expected_batch": physical * arguments.gradient_accumulation_steps,
        "training_images": len(images),
        "test_images": len(test),
        "parameters": sum(p.numel() for p in model.parameters()),
        "minutes": (time.process_time() - start) / 60,
        "resumed": bool(last),
    }
    write_json(kept, result)
    return result


def summary(values: Sequence[float]) -> str:
    """Mean in per cent with the standard deviation over seeds, where there are several."""
    mean = f"{100 * statistics.mean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} +/- {100 * statistics.stdev(values):.2f}"


def command_of(run: dict, seeds: Sequence[int]) -> str:
    """The command line that repeats runs of one set and settings."""
    given = run["settings"]
    words = ["python", "-m", "benchmarks.dpnas_images", "--sets", run["set"]]
    words += ["--epochs", f"{given['epochs']:g}", "--batch", str(given["batch"]), "--seeds", *map(str, seeds)]
    words += ["--learning-rate", f"{given['learning_rate']:g}"] if given["learning_rate"] != 2.0 else []
    words += ["--limit", str(given["limit"])] if given["limit"] else []
    words += ["--epsilon", f"{given['epsilon']:g}"] if given["epsilon"] != 3.0 else []
    return shlex.join(words)


def report(folder: Path) -> None:
    """The result file from every finished run."""
    groups: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        groups.setdefault(f"{run['set']} / {run['arm']} / {json.dumps(run['settings'])}", []).append(run)
    order = {name: number for number, name in enumerate(SETS)}
    ranked = sorted(
        groups.values(), key=lambda runs: (order[runs[0]["set"]], runs[0]["arm"], -runs[0]["steps"])
    )
    rows = []
    for runs in ranked:
        first = runs[0]
        rows.append(
            [
                first["set"],
                first["arm"],
                first["parameters"],
                f"{first['steps']} of {first['expected_batch']}",
                f"{first['noise_multiplier']:.2f}",
                f"{first['epsilon']:.2f}" if math.isfinite(first["epsilon"]) else "inf",
                summary([run["accuracy"] for run in runs]),
                len(runs),
                SETS[first["set"]][3] if first["arm"] == "DPNASNet" else "",
                f"{statistics.mean(run['minutes'] for run in runs):.1f}",
            ]
        )
    write_result(
        "dpnas_images",
        command="; ".join(
            dict.fromkeys(command_of(runs[0], sorted({run["seed"] for run in runs})) for runs in ranked)
        ),
        config={"settings": [runs[0]["settings"] for runs in ranked], "max_grad_norm": 0.1, "delta": 1e-5},
        seeds=sorted({run["seed"] for runs in ranked for run in runs}),
        packages=("transformers", "opacus", "dp-accounting"),
        columns=(
            "data",
            "network",
            "parameters",
            "steps of records (expected)",
            "noise multiplier",
            "epsilon (PLD, delta 1e-5)",
            "test accuracy, %",
            "seeds",
            "paper, %",
            "CPU minutes",
        ),
        rows=rows,
        notes=[
            "Poisson sampling over all training images, learning rate falling to 0, last step, no choice on "
            "test images; the paper trains 1,160 steps of 2,048 (MNIST, FashionMNIST) and 720 of 2,048 "
            "(CIFAR-10) and reports the best test epoch of shuffled batches accounted as Poisson ones.",
            "MNIST is scored on the 5,000 test images with even index. FashionMNIST and CIFAR-10 "
            "are small subsets, the CIFAR images JPEG-compressed: compare these with each other.",
        ],
        details={
            f"{runs[0]['set']} / {runs[0]['arm']} / {number}": runs for number, runs in enumerate(ranked)
        },
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/dpnas_images"))
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=40.0)
    parser.add_argument("--batch", type=int, default=2048, help="expected batch size")
    parser.add_argument("--learning-rate", type=float, default=2.0, help="at the start; falls to 0")
    parser.add_argument("--chunk", type=int, default=64, help="records computed at once; changes speed only")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--epsilon", type=float, default=3.0)
    parser.add_argument("--limit", type=int, default=None, help="use only so many training images")
    parser.add_argument("--short", action="store_true", help="one tiny run an arm; writes no result")
    options = parser.parse_args(argv)
    if options.short:
        options.sets, options.seeds, options.epochs, options.limit = (
            ["FashionMNIST, 1,600 images"],
            [0],
            0.5,
            200,
        )
        options.work_dir = options.work_dir / "short"
    options.work_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for seed, name, arm in itertools.product(options.seeds, options.sets, options.arms):
        run = train_once(name, arm, seed, options.work_dir, options)
        shown = {key: run[key] for key in ("set", "arm", "seed", "steps", "epsilon", "accuracy", "minutes")}
        print(json.dumps(shown), flush=True)
    if not options.short:
        report(options.work_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
