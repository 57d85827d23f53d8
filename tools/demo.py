"""The main job on real input: one detector teaches another to find blood cells.

Trains a teacher (FCOS) and three students (RetinaNet: plain, with PKD, with plain MSE imitation as a control)
through mmdet's own train.py, then writes a page with what was measured and what the detectors see. Runs that
have finished are kept; an interrupted run resumes. The checkpoints of the students are plain RetinaNets.
"""

import argparse
import importlib
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tools import report_page  # noqa: E402
from tools.training_runs import Training, run_side_by_side, training_curve, validation  # noqa: E402

TEACHER, PLAIN, PKD, MSE = "teacher (FCOS)", "student, plain", "student, PKD", "student, MSE control"
SCORE_THRESHOLD = 0.3
NUM_PICTURES = 3


def plan(work_dir: Path, *, teacher_epochs: int, student_epochs: int) -> dict[str, Training]:
    """The four trainings; the two distilled students need the teacher's checkpoint."""
    teacher = Training(
        name=TEACHER,
        config="configs/pkd/fcos_r18_bccd.py",
        work_dir=work_dir / "teacher",
        epochs=teacher_epochs,
    )
    from_teacher = {"model.distill.teacher_ckpt": str(teacher.checkpoint)}
    students = {
        PLAIN: ("retinanet_r18_bccd", {}),
        PKD: ("pkd_fcos_retinanet_r18_bccd", from_teacher),
        MSE: ("mse_fcos_retinanet_r18_bccd", from_teacher),
    }
    return {TEACHER: teacher} | {
        name: Training(
            name=name,
            config=f"configs/pkd/{config}.py",
            work_dir=work_dir / config.split("_")[0],
            epochs=student_epochs,
            options=options,
        )
        for name, (config, options) in students.items()
    }


def summary(runs: Mapping[str, Training]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the result table: accuracy of each detector after its last epoch."""
    rows = []
    plain = validation(runs[PLAIN].work_dir)[runs[PLAIN].epochs]["bbox_mAP"]
    for name, run in runs.items():
        scores = validation(run.work_dir)[run.epochs]
        gain = "" if name in (TEACHER, PLAIN) else f"{100 * (scores['bbox_mAP'] - plain):+.1f}"
        rows.append(
            [
                name,
                str(run.epochs),
                f"{100 * scores['bbox_mAP']:.1f}",
                f"{100 * scores['bbox_mAP_50']:.1f}",
                gain,
            ]
        )
    return ["detector", "epochs", "mAP", "mAP at IoU .5", "gain in mAP"], rows


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal."""
    widths = [max(len(row[index]) for row in [columns, *rows]) for index in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in [columns, *rows]
    )


def draw(image: Any, boxes: Any, labels: Any, palette: Sequence[tuple[int, int, int]]) -> bytes:
    """A JPEG of an image (H, W, 3; BGR) with boxes (n, 4; x1 y1 x2 y2 in pixels) coloured by class."""
    import cv2

    canvas = cv2.resize(image, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    for box, label in zip(boxes, labels, strict=True):
        x1, y1, x2, y2 = (round(2 * float(v)) for v in box)
        cv2.rectangle(canvas, (x1, y1), (x2, y2), palette[int(label)][::-1], 3)
    return cv2.imencode(".jpg", canvas, [cv2.IMWRITE_JPEG_QUALITY, 82])[1].tobytes()


def pictures(runs: Mapping[str, Training], *, num: int = NUM_PICTURES) -> str:
    """Detections of every detector next to the annotation, for the first validation images."""
    importlib.import_module(
        "mm_plugins"
    )  # Before mmdet: it puts the stand-in for mmcv's compiled ops in place.
    import cv2
    from mmdet.apis import inference_detector, init_detector
    from mmdet.registry import DATASETS
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    config = Config.fromfile(str(ROOT / "configs/pkd/retinanet_r18_bccd.py"))
    init_default_scope("mmdet")
    data = DATASETS.build(config.val_dataloader.dataset)
    palette, classes = config.metainfo["palette"], config.metainfo["classes"]
    samples = [data.get_data_info(index) for index in range(0, len(data), max(1, len(data) // num))][:num]
    images = [cv2.imread(sample["img_path"]) for sample in samples]
    rows = [
        [
            report_page.picture(
                draw(
                    image,
                    [i["bbox"] for i in s["instances"]],
                    [i["bbox_label"] for i in s["instances"]],
                    palette,
                ),
                "annotation",
            )
        ]
        for image, s in zip(images, samples, strict=True)
    ]
    # A distilled student is a plain RetinaNet: its checkpoint loads into the plain config.
    for name, run in runs.items():
        plain = "fcos_r18_bccd" if name == TEACHER else "retinanet_r18_bccd"
        model = init_detector(str(ROOT / f"configs/pkd/{plain}.py"), str(run.checkpoint), device="cpu")
        for row, image in zip(rows, images, strict=True):
            found = inference_detector(model, image).pred_instances
            found = found[found.scores > SCORE_THRESHOLD]
            row.append(
                report_page.picture(
                    draw(image, found.bboxes, found.labels, palette), f"{name}: {len(found)} cells"
                )
            )
    legend = ", ".join(
        f'<span style="color:rgb{tuple(colour)}">&#9632;</span> {name}'
        for name, colour in zip(classes, palette, strict=True)
    )
    body = "".join(f'<div class="pictures">{"".join(row)}</div>' for row in rows)
    note = "FCOS multiplies its scores by a centre-ness, so fewer of its boxes pass."
    return f"<p>{legend}; detections with a score above {SCORE_THRESHOLD}. {note}</p>{body}"


def charts(runs: Mapping[str, Training]) -> str:
    """Accuracy over epochs and Pearson's r over iterations."""
    accuracy = {
        name: {epoch: 100 * scores["bbox_mAP"] for epoch, scores in validation(run.work_dir).items()}
        for name, run in runs.items()
    }
    parts = [
        report_page.line_chart(
            "Accuracy on images never trained on", accuracy, x_label="epoch", y_label="box mAP"
        )
    ]
    for name in (PKD, MSE):
        levels = {
            f"P{level + 3}": training_curve(runs[name].work_dir, f"pkd/r_{level}") for level in range(4)
        }
        title = f"Agreement with the teacher: {name}"
        parts.append(report_page.line_chart(title, levels, x_label="iteration", y_label="Pearson's r"))
    return f'<div class="charts">{"".join(parts)}</div>'


def write_page(runs: Mapping[str, Training], path: Path, *, minutes: float) -> None:
    """The whole report as one file, put in place at once."""
    columns, rows = summary(runs)
    body = (
        "<p>A RetinaNet with a quarter-width ResNet-18 learns to find blood cells on 205 images (BCCD, MIT, "
        "320x240), alone and from an FCOS of twice its width. Same epochs, same data order, one seed; the "
        "figures over several seeds stand in <code>mm_plugins/pkd/README.md</code>.</p>"
        + report_page.table(columns, rows)
        + "<h2>How they learned</h2>"
        + charts(runs)
        + "<h2>What they see</h2>"
        + pictures(runs)
        + "<h2>Do it yourself</h2><p>Each line below is mmdet's own <code>tools/train.py</code>:</p><pre>"
        + "\n".join(
            f"python tools/mm.py train {run.config} --cfg-options {' '.join(run.overrides())}"
            for run in runs.values()
        ).replace(str(ROOT) + "/", "")
        + f'</pre><p class="soft">This run took {minutes:.1f} minutes on {os.cpu_count()} CPU cores.</p>'
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(report_page.page("One detector teaches another", body), encoding="utf-8")
    part.replace(path)


def main(argv: Sequence[str]) -> int:
    """Train what is not trained yet, print the table, write the page; returns the exit code."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "demo_out", help="folder of the page and the runs")
    parser.add_argument("--teacher-epochs", type=int, default=8, help="epochs of the teacher")
    parser.add_argument("--student-epochs", type=int, default=8, help="epochs of each student")
    parser.add_argument("--fresh", action="store_true", help="forget earlier runs")
    args = parser.parse_args(argv)
    for option, epochs in (("teacher", args.teacher_epochs), ("student", args.student_epochs)):
        if epochs < 2 or epochs % 2:
            parser.error(
                f"--{option}-epochs must be even and at least 2, as validation is every second epoch; "
                f"got {epochs}."
            )
    out = args.out.resolve()
    if args.fresh:
        shutil.rmtree(out, ignore_errors=True)
    runs = plan(out / "runs", teacher_epochs=args.teacher_epochs, student_epochs=args.student_epochs)
    start = time.monotonic()
    threads = max(1, (os.cpu_count() or 2) // 2)
    try:
        print(
            "1/3 training the teacher and the plain student (logs: demo_out/runs/*/console.log)", flush=True
        )
        run_side_by_side([runs[TEACHER], runs[PLAIN]], threads=threads, show=_show)
        print("2/3 training the students that learn from the teacher", flush=True)
        run_side_by_side([runs[PKD], runs[MSE]], threads=threads, show=_show)
    except RuntimeError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; the same command goes on from the last epoch", file=sys.stderr)
        return 130
    print("3/3 drawing what the detectors see", flush=True)
    page = out / "index.html"
    write_page(runs, page, minutes=(time.monotonic() - start) / 60)
    print("\n" + text_table(*summary(runs)))
    print(f"\nThe whole report: {page}")
    return 0


def _show(line: str) -> None:
    print("    " + line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
