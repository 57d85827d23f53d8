"""Does PKD help on real images? Plain training, PKD and plain-MSE imitation at equal epochs, several seeds.

One teacher (FCOS) is trained once; every student arm is trained with each seed through mmdet's own train.py
on the blood-cell images of ``tests/data/bccd``. Runs are kept in ``--work-dir`` and resumed, so an
interrupted benchmark goes on where it stopped. Writes ``docs/results/pkd_bccd.json``.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.record import write_result  # noqa: E402
from tools.training_runs import Training, run_side_by_side, training_curve, validation  # noqa: E402

ARMS = {
    "plain": "configs/pkd/retinanet_r18_bccd.py",
    "PKD": "configs/pkd/pkd_fcos_retinanet_r18_bccd.py",
    "plain MSE (control)": "configs/pkd/mse_fcos_retinanet_r18_bccd.py",
}
# Two-sided 95 % quantile of Student's t for 1, 2, ... degrees of freedom.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % confidence interval (Student's t) of two values or more."""
    half = STUDENT_T[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), half


def student_runs(
    teacher: Training, work_dir: Path, seeds: Sequence[int], epochs: int
) -> dict[tuple[str, int], Training]:
    """Every arm with every seed."""
    runs = {}
    for seed in seeds:
        for arm, config in ARMS.items():
            options: dict[str, object] = {"randomness.seed": seed}
            if arm != "plain":
                options["model.distill.teacher_ckpt"] = str(teacher.checkpoint)
            folder = work_dir / f"{Path(config).stem}_seed{seed}"
            name = f"{arm}, seed {seed}"
            runs[arm, seed] = Training(
                name=name, config=config, work_dir=folder, epochs=epochs, options=options
            )
    return runs


def last_correlation(run: Training) -> str:
    """Pearson's r of the four levels at the end of a distilled run."""
    curves = [training_curve(run.work_dir, f"pkd/r_{level}") for level in range(4)]
    return " ".join(f"{curve[max(curve)]:.2f}" for curve in curves) if all(curves) else ""


def table(
    runs: dict[tuple[str, int], Training], seeds: Sequence[int]
) -> tuple[list[list[str]], dict[str, dict]]:
    """Rows of the docs' table, and the raw figures of each arm."""
    final = {
        key: {metric: 100 * value for metric, value in validation(run.work_dir)[run.epochs].items()}
        for key, run in runs.items()
    }
    rows, raw = [], {}
    for arm in ARMS:
        scores = [final[arm, seed]["bbox_mAP"] for seed in seeds]
        mean, half = interval(scores)
        at_half = statistics.mean(final[arm, seed]["bbox_mAP_50"] for seed in seeds)
        gain = ""
        if arm != "plain":
            # The same seed gives the same first weights and data order: the paired difference has less noise.
            pairs = [final[arm, seed]["bbox_mAP"] - final["plain", seed]["bbox_mAP"] for seed in seeds]
            gain = "{:+.1f} +/- {:.1f}".format(*interval(pairs))
        rows.append(
            [arm, f"{mean:.1f} +/- {half:.1f}", f"{at_half:.1f}", gain, last_correlation(runs[arm, seeds[0]])]
        )
        raw[arm] = {
            "mAP": scores,
            "by_epoch": {
                str(seed): {k: v["bbox_mAP"] for k, v in validation(runs[arm, seed].work_dir).items()}
                for seed in seeds
            },
        }
    return rows, raw


def main(argv: Sequence[str]) -> int:
    """Train what is missing, then write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=12, help="epochs of every student")
    parser.add_argument("--teacher-epochs", type=int, default=24)
    parser.add_argument("--jobs", type=int, default=2, help="trainings at the same time, one thread each")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "work_dirs" / "pkd_bccd")
    parser.add_argument("--short", action="store_true", help="two seeds, two epochs: a check that it runs")
    args = parser.parse_args(argv)
    if args.short:
        args.seeds, args.epochs, args.teacher_epochs = [0, 1], 2, 2
        args.work_dir = args.work_dir.with_name("pkd_bccd_short")
    if len(args.seeds) < 2:
        parser.error(f"--seeds needs at least two seeds for an interval; got {args.seeds}.")
    work_dir = args.work_dir.resolve()
    config = "configs/pkd/fcos_r18_bccd.py"
    teacher = Training(
        name="teacher", config=config, work_dir=work_dir / "teacher", epochs=args.teacher_epochs
    )
    runs = student_runs(teacher, work_dir, args.seeds, args.epochs)
    run_side_by_side([teacher], show=_show, seconds=30)
    waiting = list(runs.values())
    for first in range(0, len(waiting), args.jobs):
        run_side_by_side(waiting[first : first + args.jobs], show=_show, seconds=30)
    rows, raw = table(runs, args.seeds)
    taught = validation(teacher.work_dir)[teacher.epochs]
    rows.insert(
        0, ["teacher (FCOS)", f"{100 * taught['bbox_mAP']:.1f}", f"{100 * taught['bbox_mAP_50']:.1f}", "", ""]
    )
    for row in rows:
        print("  ".join(f"{cell:<22}" for cell in row))
    if not args.short:
        write_result(
            "pkd_bccd",
            command="python benchmarks/pkd_bccd.py",
            config={
                "epochs": args.epochs,
                "teacher_epochs": args.teacher_epochs,
                "arms": ARMS,
                "teacher": config,
            },
            seeds=args.seeds,
            packages=("mmdet", "mmengine", "numpy"),
            columns=[
                "detector",
                "box mAP",
                "mAP at IoU .5",
                "gain over plain, paired",
                "r of P3..P6 at the end",
            ],
            rows=rows,
            notes=[
                f"BCCD, 205 training and 87 validation images at 320x240, {args.epochs} epochs for each "
                "student, mean and 95 % interval over the seeds; one teacher for all."
            ],
            details=raw,
        )
    return 0


def _show(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
