"""Does SpatialFlow learn, and what do its flows change? Real images, mmdet's own train.py.

``coco``: three COCO images with 133 classes learned by heart (training and test images are the same).
``nuclei``: 77 training and 23 other validation images, every choice of flows with every seed.
Finished runs are kept in ``--work-dir``, so an interrupted benchmark goes on where it stopped. Writes
``docs/results/spatialflow_coco.json`` and ``docs/results/spatialflow_nuclei.json``.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.record import write_result  # noqa: E402
from tools.real_data import data_set  # noqa: E402
from tools.training_runs import Training, read_scalars, run_side_by_side  # noqa: E402

CONFIGS = {
    "nuclei": "configs/spatialflow/spatialflow_r18_nuclei.py",
    "coco": "configs/spatialflow/spatialflow_r18_coco_mini.py",
}
FOLDERS = {"nuclei": "nuclei_dsb2018", "coco": "coco_panoptic_mini"}
VALIDATION = {
    "nuclei": ("panoptic_val.json", "panoptic/val/"),
    "coco": ("annotations/panoptic_train2017.json", "annotations/panoptic_train2017/"),
}
EPOCHS = {"nuclei": 10, "coco": 400}
ALL = ("cls", "stuff", "mask", "stuff_mask")
ARMS: dict[str, dict[str, tuple[str, ...]]] = {
    "nuclei": {
        "none": (),
        "reg -> cls": ("cls",),
        "reg -> stuff": ("stuff",),
        "reg -> mask": ("mask",),
        "all four": ALL,
    },
    "coco": {"all four": ALL},
}
# Two-sided 95 % quantile of Student's t for 1, 2, ... degrees of freedom.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
METRICS = ("PQ", "PQ_th", "SQ_th", "RQ_th", "PQ_st")


def interval(values: Sequence[float]) -> str:
    """Mean, and half-width of the 95 % confidence interval (Student's t) where there is more than one
    value."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    half = STUDENT_T[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.2f} +/- {half:.2f}"


def training(data: str, arm: str, seed: int, *, epochs: int, work_dir: Path) -> Training:
    """One run, validated once at its end."""
    folder = data_set(FOLDERS[data])
    annotations, pngs = VALIDATION[data]
    options: dict[str, Any] = {
        "randomness.seed": seed,
        "train_cfg.val_interval": epochs,
        "model.bbox_head.flows": f"({','.join(ARMS[data][arm])},)" if ARMS[data][arm] else "()",
        "val_evaluator.ann_file": str(folder / annotations),
        "val_evaluator.seg_prefix": str(folder / pngs),
    }
    for loader in ("train", "val", "test"):
        options[f"{loader}_dataloader.dataset.data_root"] = str(folder)
    slug = "".join(letter if letter.isalnum() else "_" for letter in arm)
    return Training(
        name=f"{data}, flows {arm}, seed {seed}",
        config=CONFIGS[data],
        work_dir=work_dir / data / f"{slug}_seed{seed}",
        epochs=epochs,
        options=options,
    )


def scores(run: Training) -> dict[str, float]:
    """Panoptic quality at the end of a run, in per cent."""
    key = "coco_panoptic/"
    rows = [row for row in read_scalars(run.work_dir) if key + "PQ" in row and row["step"] == run.epochs]
    return {name: rows[-1][key + name] for name in METRICS}


def write(data: str, runs: dict[tuple[str, int], Training], seeds: Sequence[int]) -> None:
    """The result file of one data set."""
    final = {key: scores(run) for key, run in runs.items()}
    rows, raw = [], {}
    for arm in ARMS[data]:
        raw[arm] = {str(seed): final[arm, seed] for seed in seeds}
        cells = [interval([final[arm, seed][metric] for seed in seeds]) for metric in METRICS]
        if data == "nuclei":
            # The same seed gives the same data order: the paired difference has less noise.
            gains = [final[arm, seed]["PQ"] - final["none", seed]["PQ"] for seed in seeds]
            cells.insert(1, "" if arm == "none" else interval(gains))
        rows.append([arm, *cells])
    columns = ["flows", *METRICS]
    if data == "nuclei":
        columns.insert(2, "gain in PQ, paired")
    epochs = next(iter(runs.values())).epochs
    for row in rows:
        print("  ".join(f"{cell:<18}" for cell in row))
    write_result(
        f"spatialflow_{data}",
        command=f"python -m benchmarks.spatialflow_training --data {data}",
        config={
            "config": CONFIGS[data],
            "epochs": epochs,
            "arms": {a: list(f) for a, f in ARMS[data].items()},
        },
        seeds=list(seeds),
        packages=("mmdet", "mmengine", "numpy"),
        columns=columns,
        rows=rows,
        notes=[NOTES[data].format(epochs=epochs)],
        details=raw,
    )


NOTES = {
    "nuclei": (
        "2018 Data Science Bowl, 77 training and 23 other validation images; quarter-width ResNet-18, 64 "
        "channels "
        "in pyramid and heads, from scratch, {epochs} epochs on crops of 128x128: a short training, far from "
        "convergence. Mean and 95 % interval (Student's t) over the seeds; gains are to `none` with the "
        "same seed."
    ),
    "coco": (
        "Three COCO images, 133 classes, training and test images the same: learned by heart in {epochs} "
        "steps by the quarter-width ResNet-18 with 64 channels, from scratch. It shows that the chain is "
        "right, and nothing about other images."
    ),
}


def main(argv: Sequence[str]) -> int:
    """Train what is missing, then write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=sorted(FOLDERS), default=sorted(FOLDERS))
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2 for nuclei, 0 for coco")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at the same time, one thread each")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "work_dirs" / "spatialflow")
    parser.add_argument("--train-only", action="store_true", help="write no table")
    parser.add_argument("--short", action="store_true", help="one epoch of one arm: a check that it runs")
    args = parser.parse_args(argv)
    if args.short:
        args.data, args.seeds, args.train_only = ["nuclei"], [0], True
        args.work_dir = args.work_dir.with_name("spatialflow_short")
    for data in args.data:
        seeds = args.seeds or ([0, 1, 2] if data == "nuclei" else [0])
        arms = ["all four"] if args.short else list(ARMS[data])
        runs = {
            (arm, seed): training(
                data, arm, seed, epochs=1 if args.short else EPOCHS[data], work_dir=args.work_dir.resolve()
            )
            for seed in seeds
            for arm in arms
        }
        waiting = list(runs.values())
        for first in range(0, len(waiting), args.jobs):
            run_side_by_side(waiting[first : first + args.jobs], show=_show, seconds=5)
        if not args.train_only:
            write(data, runs, seeds)
    return 0


def _show(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
