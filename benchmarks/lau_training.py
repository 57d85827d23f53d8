"""Does LaU help on real images? Bilinear controls, LaU without and with its losses, DySample's offsets.

Every arm is trained with every seed through mmseg's own train.py on nuclei (2 classes) and CamVid (11
classes). Finished runs are kept in ``--work-dir``, so an interrupted benchmark goes on where it stopped.
Writes ``docs/results/lau_nuclei.json`` and ``docs/results/lau_camvid.json``.
"""

import argparse
import importlib
import json
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.record import RESULTS, write_result  # noqa: E402
from tools.real_data import data_set  # noqa: E402
from tools.training_runs import Training, read_scalars, run_side_by_side  # noqa: E402

LAU = "model.decode_head.lau."
REFERENCE = "bilinear, half-pixel"
# Name of the arm -> which config, and what is changed in it.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "bilinear, align_corners": ("fcn", {"model.decode_head.align_corners": True}),
    REFERENCE: ("fcn", {}),
    "p/k, zero offsets (control)": (
        "lau",
        {LAU + "branch": "zero", LAU + "base_grid": "asymmetric", LAU + "loss": None},
    ),
    "LaU": ("lau", {LAU + "loss": None}),
    "LaU + off": ("lau", {LAU + "loss.mode": "off"}),
    "LaU + reg": ("lau", {}),
    "LaU + reg, paper's preset": ("lau", {LAU + "base_grid": "asymmetric", LAU + "init": "xavier"}),
    "DySample offsets": ("lau", {LAU + "branch": "dysample", LAU + "loss": None}),
    "DySample offsets + reg": ("lau", {LAU + "branch": "dysample"}),
}
# What the published tables hold; the other arms run on request (--arms).
TABLE_ARMS = {
    "nuclei": [
        "bilinear, align_corners",
        REFERENCE,
        "p/k, zero offsets (control)",
        "LaU",
        "LaU + off",
        "LaU + reg",
        "DySample offsets",
    ],
    "camvid": [
        "bilinear, align_corners",
        REFERENCE,
        "LaU",
        "LaU + off",
        "LaU + reg",
        "DySample offsets",
    ],
}
CONFIGS = {"fcn": "configs/lau/fcn_r18_{data}.py", "lau": "configs/lau/lau_fcn_r18_{data}.py"}
FOLDERS = {"nuclei": "nuclei_dsb2018", "camvid": "camvid_mini"}
EPOCHS = {"nuclei": 40, "camvid": 60}
# Two-sided 95 % quantile of Student's t for 1, 2, ... degrees of freedom.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % confidence interval (Student's t) of two values or more."""
    half = STUDENT_T[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), half


def config_of(arm: str, data: str) -> str:
    """Path of the config an arm starts from."""
    return CONFIGS[ARMS[arm][0]].format(data=data)


def training(arm: str, data: str, seed: int, *, epochs: int, work_dir: Path) -> Training:
    """One run, validated once at its end."""
    options: dict[str, Any] = {"randomness.seed": seed, "train_cfg.val_interval": epochs, **ARMS[arm][1]}
    folder = str(data_set(FOLDERS[data]))
    for loader in ("train", "val", "test"):
        options[f"{loader}_dataloader.dataset.data_root"] = folder
    slug = "".join(letter if letter.isalnum() else "_" for letter in arm)
    return Training(
        name=f"{data}, {arm}, seed {seed}",
        config=config_of(arm, data),
        work_dir=work_dir / data / f"{slug}_seed{seed}",
        epochs=epochs,
        options=options,
    )


def scores(run: Training) -> dict[str, float]:
    """mIoU and boundary mIoU at the end of a run, in per cent."""
    rows = [row for row in read_scalars(run.work_dir) if "mIoU" in row and row["step"] == run.epochs]
    return {"mIoU": rows[-1]["mIoU"], "mBIoU": rows[-1]["mBIoU"]}


def fluorescence_scores(run: Training) -> dict[str, float]:
    """The same two metrics over the fluorescence images alone, from the run's checkpoint.

    The set mixes them with a few images of stained tissue, where nuclei are dark on light ground: too few to
    learn, and whether one seed happens to get them decides the total.
    """
    # First, and not sorted among the others: it makes mmseg importable without compiled operators.
    importlib.import_module("mm_plugins")
    import mmcv
    from mmengine.config import Config
    from mmseg.apis import inference_model, init_model
    from mmseg.evaluation.metrics import IoUMetric

    from mm_plugins.lau.boundary import boundary_areas, boundary_width

    config = Config.fromfile(ROOT / run.config)
    config.merge_from_dict(dict(run.options))
    model = init_model(config, str(run.checkpoint), device="cpu")
    folder = data_set(FOLDERS["nuclei"])
    areas = []
    for path in sorted((folder / "images" / "val").glob("*.png")):
        if mmcv.imread(str(path), flag="unchanged").ndim == 3:
            continue  # Colour: stained tissue.
        image = mmcv.imread(str(path))
        label = torch.from_numpy(mmcv.imread(str(folder / "semantic" / "val" / path.name), flag="unchanged"))
        predicted = inference_model(model, image).pred_sem_seg.data[0]
        depth = boundary_width(*label.shape)
        near = boundary_areas(predicted[None], label[None].long(), 2, depth=depth)
        areas.append(torch.stack([*IoUMetric.intersect_and_union(predicted, label, 2, 255)[:2], *near]))
    total = torch.stack(areas).sum(0)
    return {
        "mIoU": 100 * (total[0] / total[1]).mean().item(),
        "mBIoU": 100 * (total[2] / total[3]).mean().item(),
    }


def cost(arms: Sequence[str], data: str, *, side: int = 256, rounds: int = 7) -> dict[str, dict[str, float]]:
    """Parameters, multiply-adds of the convolutions, and time of one image and of one training step.

    The arms take turns, so that whatever else the machine does hits all of them.
    """
    importlib.import_module("mm_plugins")
    from mmengine.config import Config
    from mmengine.registry import init_default_scope
    from mmengine.structures import PixelData
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample
    from torch.utils.flop_counter import FlopCounterMode

    init_default_scope("mmseg")
    image = torch.randn(1, 3, side, side)
    batch = torch.randn(8, 3, side // 2, side // 2)
    models, found = {}, {}
    for arm in arms:
        config = Config.fromfile(ROOT / config_of(arm, data))
        config.merge_from_dict(ARMS[arm][1])
        models[arm] = MODELS.build(config.model).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            models[arm](image)
        found[arm] = {
            "parameters": sum(p.numel() for p in models[arm].parameters()),
            "MMAC": counter.get_total_flops() / 2e6,
        }
    classes = next(iter(models.values())).decode_head.num_classes
    labels = torch.randint(classes, (8, 1, side // 2, side // 2))
    samples = [SegDataSample(gt_sem_seg=PixelData(data=label)) for label in labels]
    test_times: dict[str, list[float]] = {arm: [] for arm in arms}
    step_times: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, model in models.items():
            start = time.process_time()
            with torch.no_grad():
                model.eval().predict(image)
            test_times[arm].append(time.process_time() - start)
            start = time.process_time()
            losses = model.train().loss(batch, samples)
            sum(value for key, value in losses.items() if "loss" in key).backward()
            step_times[arm].append(time.process_time() - start)
    for arm in arms:
        found[arm]["test_ms"] = 1000 * statistics.median(test_times[arm])
        found[arm]["step_ms"] = 1000 * statistics.median(step_times[arm])
    return found


def table(
    final: Mapping[tuple[str, int], Mapping[str, float]],
    seeds: Sequence[int],
    costs: Mapping[str, Mapping[str, float]],
) -> tuple[list[list[str]], dict[str, Any]]:
    """Rows of the docs' table, and the raw figures of each arm."""
    rows, raw = [], {}
    for arm in costs:
        cells = [arm]
        for metric in ("mIoU", "mBIoU"):
            values = [final[arm, seed][metric] for seed in seeds]
            cells.append("{:.2f} +/- {:.2f}".format(*interval(values)))
            # The same seed gives the same data order: the paired difference has less noise.
            pairs = [
                value - final[REFERENCE, seed][metric] for value, seed in zip(values, seeds, strict=True)
            ]
            cells.append("" if arm == REFERENCE else "{:+.2f} +/- {:.2f}".format(*interval(pairs)))
        this = costs[arm]
        cells += [f"{this['parameters'] / 1e3:.1f}", f"{this['MMAC']:.0f}"]
        cells += [f"{this['test_ms']:.0f}", f"{this['step_ms']:.0f}"]
        rows.append(cells)
        raw[arm] = {"scores": {str(seed): final[arm, seed] for seed in seeds}, "cost": dict(this)}
    return rows, raw


Scores = dict[tuple[str, int], dict[str, float]]


def recorded(data: str, config: Mapping[str, Any]) -> dict[str, Scores]:
    """Scores of the seeds that the result file holds, by the images they are over.

    Raises:
        ValueError: If that file was written with other settings.
    """
    found = json.loads((RESULTS / f"lau_{data}.json").read_text(encoding="utf-8"))
    if found["config"] != config:
        raise ValueError(
            f"docs/results/lau_{data}.json was measured with other arms or epochs; leave --add out and give "
            "all seeds."
        )
    return {
        images: {(arm, int(seed)): s for arm, one in arms.items() for seed, s in one["scores"].items()}
        for images, arms in found["details"].items()
    }


def write(data: str, runs: Mapping[tuple[str, int], Training], arms: Sequence[str], *, add: bool) -> None:
    """The result file of one data set; with `add`, of the seeds it holds and of those just trained."""
    epochs = next(iter(runs.values())).epochs
    config = {
        "epochs": epochs,
        "arms": {arm: {"config": config_of(arm, data), "options": ARMS[arm][1]} for arm in arms},
    }
    known = recorded(data, config) if add else {}
    final = known.get("all images", {}) | {key: scores(run) for key, run in runs.items()}
    seeds = sorted({seed for _, seed in final})
    costs = cost(arms, data)
    rows, raw = table(final, seeds, costs)
    notes = [
        f"{NOTES[data]}; ResNet-18 of a quarter of the width at stride 8, trained from scratch for "
        f"{epochs} epochs on crops of 128x128; mean and 95 % interval (Student's t) over the seeds; "
        f"gains are differences to {REFERENCE} with the same seed; multiply-adds are those of the "
        "convolutions; CPU times on one thread, arms in turns, median."
    ]
    details: dict[str, Any] = {"all images": raw}
    if data == "nuclei":
        grey = known.get("fluorescence images", {}) | {
            key: fluorescence_scores(run) for key, run in runs.items()
        }
        grey_rows, details["fluorescence images"] = table(grey, seeds, costs)
        rows = [["20 fluorescence images: " + row[0], *row[1:]] for row in grey_rows] + [
            ["all 23 images: " + row[0], *row[1:]] for row in rows
        ]
        notes.append(
            "Three of the validation and six of the training images are stained tissue, dark on light; "
            "whether a seed gets these right decides the mean over all images."
        )
    for row in rows:
        print("  ".join(f"{cell:<22}" for cell in row))
    write_result(
        f"lau_{data}",
        command=f"python -m benchmarks.lau_training --data {data} --seeds {' '.join(map(str, seeds))}",
        config=config,
        seeds=seeds,
        packages=("mmsegmentation", "mmengine", "numpy"),
        columns=[
            "logits enlarged 8 times by",
            "mIoU",
            "gain, paired",
            "boundary mIoU",
            "gain, paired",
            "parameters (k)",
            "MMAC at 256x256",
            "CPU ms an image",
            "CPU ms a step of 8 crops",
        ],
        rows=rows,
        notes=notes,
        details=details,
    )


NOTES = {
    "nuclei": "2018 Data Science Bowl, 77 training and 23 validation images",
    "camvid": "CamVid, 36 training and 14 validation images of 480x360",
}


def main(argv: Sequence[str]) -> int:
    """Train what is missing, then write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=sorted(FOLDERS), default=sorted(FOLDERS, reverse=True))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="default: those of the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--add", action="store_true", help="keep the seeds that the result file holds")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at the same time, one thread each")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "work_dirs" / "lau")
    parser.add_argument("--train-only", action="store_true", help="write no table")
    parser.add_argument("--short", action="store_true", help="one epoch of two arms: a check that it runs")
    args = parser.parse_args(argv)
    if args.short:
        args.arms, args.seeds, args.train_only = [REFERENCE, "LaU + reg"], [0], True
        args.work_dir = args.work_dir.with_name("lau_short")
    few = len(args.seeds) < 2 and not args.add
    if not args.train_only and (few or REFERENCE not in (args.arms or [REFERENCE])):
        parser.error(f"a table needs two seeds or more and the arm {REFERENCE!r}.")
    torch.set_num_threads(1)
    for data in args.data:
        epochs, arms = 1 if args.short else EPOCHS[data], args.arms or TABLE_ARMS[data]
        runs = {
            (arm, seed): training(arm, data, seed, epochs=epochs, work_dir=args.work_dir.resolve())
            for seed in args.seeds
            for arm in arms
        }
        waiting = list(runs.values())
        for first in range(0, len(waiting), args.jobs):
            run_side_by_side(waiting[first : first + args.jobs], show=_show, seconds=2)
        if not args.train_only:
            write(data, runs, arms, add=args.add)
    return 0


def _show(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
