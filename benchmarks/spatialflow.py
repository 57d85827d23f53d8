"""What SpatialFlow's parts cost, next to the literal forms and to mmdet's own, in turns on the same data.

Panoptic quality: ours, a literal loop over pairs of masks, and mmdet's copy of panopticapi's counting.
Fusion: ours, ours on whole maps, and mmdet's HeuristicFusionHead. Network: one training step and one
prediction of SpatialFlow R50 and of mmdet's PanopticFPN R50 on one real image. Writes
``docs/results/spatialflow_cost.json``.
"""

import argparse
import copy
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import mm_plugins  # noqa: E402, F401  (registers, and makes mmdet importable)
from benchmarks.record import RESULTS, spread, write_result  # noqa: E402
from mm_plugins.spatialflow.fusion import fuse  # noqa: E402
from mm_plugins.spatialflow.metric import PanopticQuality  # noqa: E402
from mm_plugins.spatialflow.quality import count_image, panoptic_quality  # noqa: E402
from mm_plugins.spatialflow.segment_ids import predicted_segments  # noqa: E402
from tools.real_data import data_set  # noqa: E402

COLUMNS = ("work", "ours", "rival", "rival's time / ours", "peak MiB, ours / rival")


def cpu_times(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each side, in turns."""
    for run in sides.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return times


def _status(name: str) -> int:
    """A line of this process's status, in KiB: VmRSS, memory now; VmHWM, its peak since it was reset."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def numpy_peak(run: Callable[[], Any]) -> float:
    """Largest memory that NumPy and Python held at once during a call, in MiB."""
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def real_maps() -> list[tuple[np.ndarray, list[dict], list[int], np.ndarray]]:
    """Real annotations (15 COCO images), and predictions made of them: moved by three pixels, boxes of
    noise."""
    folder = data_set("coco_panoptic_mini")
    metric = PanopticQuality(
        str(folder / "annotations/panoptic_val2017.json"), str(folder / "annotations/panoptic_val2017")
    )
    categories = json.loads((folder / "annotations/panoptic_val2017.json").read_text())["categories"]
    metric.dataset_meta = {"classes": [c["name"] for c in categories]}
    rng, maps = np.random.default_rng(0), []
    for image_id in metric.annotations:
        ids, segments, labels = metric._annotation({"img_id": image_id})
        panoptic = np.full(ids.shape, 133)
        for k, (segment, label) in enumerate(zip(segments, labels, strict=True), start=1):
            panoptic[ids == segment["id"]] = label + (1000 * k if label < 80 else 0)
        panoptic = np.roll(panoptic, 3, axis=1)
        for _ in range(20):
            top, left = int(rng.integers(ids.shape[0] - 40)), int(rng.integers(ids.shape[1] - 40))
            panoptic[top : top + 40, left : left + 40] = panoptic[top, left]
        maps.append((ids, segments, labels, panoptic))
    return maps


def our_quality(maps: list) -> np.ndarray:
    """PQ of each class by this suite."""
    counts = []
    for ids, segments, labels, panoptic in maps:
        found, found_labels = predicted_segments(panoptic, 133)
        crowd = [bool(s["iscrowd"]) for s in segments]
        counts.append(
            count_image(ids, [s["id"] for s in segments], labels, crowd, panoptic, found, found_labels)
        )
    return panoptic_quality(counts, 133).pq_C


def pairwise_quality(maps: list) -> np.ndarray:
    """PQ of each class by the definition: every pair of masks of one class is intersected."""
    iou, tp, fp, fn = (np.zeros(133) for _ in range(4))
    for ids, segments, labels, panoptic in maps:
        void = ~np.isin(ids, [s["id"] for s in segments])
        predicted = {int(v): panoptic == v for v in np.unique(panoptic) if v % 1000 < 133}
        crowd = {c: ids == s["id"] for s, c in zip(segments, labels, strict=True) if s["iscrowd"]}
        taken = set()
        for segment, label in zip(segments, labels, strict=True):
            if segment["iscrowd"]:
                continue
            mask, hit = ids == segment["id"], False
            for value, other in predicted.items():
                inter = (mask & other).sum()
                value_iou = inter / ((mask | other) & ~(void & ~mask)).sum()
                if value % 1000 == label and value_iou > 0.5:
                    iou[label] += value_iou
                    tp[label] += 1
                    taken.add(value)
                    hit = True
            fn[label] += not hit
        for value, other in predicted.items():
            excused = other & (void | crowd.get(value % 1000, np.zeros_like(void)))
            fp[value % 1000] += value not in taken and excused.sum() / other.sum() <= 0.5
    with np.errstate(invalid="ignore"):
        return iou / (tp + fp / 2 + fn / 2)


def sorted_pixels_quality(maps: list) -> np.ndarray:
    """As mmdet's copy of panopticapi counts: all pixels are sorted, twice; from arrays, without its PNG
    files."""
    from mm_plugins.compat.panoptic_standin import PQStat

    stat = PQStat()
    for ids, segments, labels, panoptic in maps:
        gt = {s["id"]: (c, s["area"], s["iscrowd"]) for s, c in zip(segments, labels, strict=True)}
        pred = np.where(panoptic % 1000 >= 133, 0, panoptic + 1)
        values, counts = np.unique(pred, return_counts=True)
        area = {v: n for v, n in zip(values.tolist(), counts.tolist(), strict=True) if v}
        keys, counts = np.unique(ids.astype(np.uint64) * 2**24 + pred.astype(np.uint64), return_counts=True)
        shared = {divmod(k, 2**24): n for k, n in zip(keys.tolist(), counts.tolist(), strict=True)}
        gt_taken, pred_taken = set(), set()
        for (g, p), inter in shared.items():
            if g not in gt or p not in area or gt[g][2] or gt[g][0] != (p - 1) % 1000:
                continue
            value_iou = inter / (area[p] + gt[g][1] - inter - shared.get((0, p), 0))
            if value_iou > 0.5:
                stat[gt[g][0]].tp += 1
                stat[gt[g][0]].iou += value_iou
                gt_taken.add(g)
                pred_taken.add(p)
        crowd = {}
        for g, (label, _, is_crowd) in gt.items():
            if is_crowd:
                crowd[label] = g
            elif g not in gt_taken:
                stat[label].fn += 1
        for p, size in area.items():
            label = (p - 1) % 1000
            excused = shared.get((0, p), 0) + shared.get((crowd.get(label, -1), p), 0)
            if p not in pred_taken and excused / size <= 0.5:
                stat[label].fp += 1
    _, each = stat.pq_average({c: {"isthing": 1} for c in range(133)}, None)
    return np.array([each[c]["pq"] for c in range(133)])


def quality_rows(rounds: int, raw: dict) -> list[list[str]]:
    """Panoptic quality: time and memory for an image."""
    maps = real_maps()
    sides: dict[str, Callable[[list], np.ndarray]] = {
        "ours": our_quality,
        "loop over pairs of masks": pairwise_quality,
        "panopticapi's way (all pixels sorted)": sorted_pixels_quality,
    }
    values = {name: np.nan_to_num(run(maps)) for name, run in sides.items()}
    for name, found in values.items():
        np.testing.assert_allclose(found, values["ours"], atol=1e-12, err_msg=name)
    times = cpu_times({name: (lambda run=run: run(maps)) for name, run in sides.items()}, rounds)
    peaks = {name: numpy_peak(lambda run=run: run(maps)) for name, run in sides.items()}
    raw["quality"] = {"seconds": times, "peak_mib": peaks, "images": len(maps)}
    return [
        [
            f"panoptic quality, ms an image: {name}",
            f"{1000 * statistics.median(times['ours']) / len(maps):.1f}",
            f"{1000 * statistics.median(times[name]) / len(maps):.1f}",
            spread([b / a for a, b in zip(times["ours"], times[name], strict=True)]),
            f"{peaks['ours']:.1f} / {peaks[name]:.1f}",
        ]
        for name in list(sides)[1:]
    ]


def crowd_of_instances(height: int, width: int, num: int = 100) -> tuple[torch.Tensor, ...]:
    """Ellipses in random boxes of COCO's usual sizes, scores without ties, 53 stuff classes in stripes."""
    rng = np.random.default_rng(0)
    size = np.exp(rng.uniform(np.log(20), np.log(height / 2), size=(num, 2)))
    corner = rng.uniform(0, [width - 20, height - 20], size=(num, 2))
    boxes = np.concatenate([corner, corner + size], 1).clip(0, [width, height, width, height])
    y, x = np.mgrid[:height, :width]
    masks = np.zeros((num, height, width), bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask |= ((x - (x1 + x2) / 2) / (x2 - x1)) ** 2 + ((y - (y1 + y2) / 2) / (y2 - y1)) ** 2 <= 0.25
    scores = rng.permutation(num) / num * 0.6 + 0.4
    stuff = np.repeat((np.arange(width) * 6 // width)[None], height, 0)
    labels = rng.integers(0, 80, num)
    return tuple(
        torch.from_numpy(np.ascontiguousarray(a))
        for a in (masks, boxes.astype(np.float32), scores.astype(np.float32), labels, stuff)
    )


def _fuse_logits(*tensors: torch.Tensor, cropped: bool) -> torch.Tensor:
    *instances, logits = tensors
    return fuse(
        *instances,
        logits.argmax(0),
        num_things=80,
        num_stuff=53,
        score_thr=0.0,
        box_fill=None,
        cropped=cropped,
    )


def _fuse_by_mmdet(head: nn.Module, found: Any, logits: torch.Tensor) -> torch.Tensor:
    return head.predict([found], [logits])[0].sem_seg[0].int()


def fusion_rows(rounds: int, raw: dict, sizes: Sequence[tuple[int, int]]) -> list[list[str]]:
    """Fusion of 100 instances."""
    from mmdet.models.seg_heads.panoptic_fusion_heads import HeuristicFusionHead
    from mmengine.config import ConfigDict
    from mmengine.structures import InstanceData

    head = HeuristicFusionHead(test_cfg=ConfigDict(mask_overlap=0.37, stuff_area_limit=4900))
    rows = []
    for height, width in sizes:
        masks, boxes, scores, labels, stuff = crowd_of_instances(height, width)
        found = InstanceData(masks=masks, bboxes=boxes, scores=scores, labels=labels)
        logits = torch.nn.functional.one_hot(stuff, 54).permute(2, 0, 1).float()

        ours = functools.partial(_fuse_logits, masks, boxes, scores, labels, logits)
        sides: dict[str, Callable[[], torch.Tensor]] = {
            "ours": functools.partial(ours, cropped=True),
            "ours on whole maps": functools.partial(ours, cropped=False),
            "mmdet's HeuristicFusionHead": functools.partial(_fuse_by_mmdet, head, found, logits),
        }
        results = [run() for run in sides.values()]
        if not all(torch.equal(results[0], other) for other in results[1:]):
            raise RuntimeError(
                "the fused maps differ; nothing is compared then. Look for the fault in fuse()."
            )
        times = cpu_times(sides, rounds)
        raw[f"fusion {height}x{width}"] = {"seconds": times}
        rows += [
            [
                f"fusion of 100 instances at {height}x{width}, ms: {name}",
                f"{1000 * statistics.median(times['ours']):.0f}",
                f"{1000 * statistics.median(times[name]):.0f}",
                spread([b / a for a, b in zip(times["ours"], times[name], strict=True)]),
                "",
            ]
            for name in list(sides)[1:]
        ]
    return rows


NETWORKS = {
    "SpatialFlow": "configs/spatialflow/spatialflow_r50_fpn_20e_coco.py",
    "PanopticFPN": "configs/spatialflow/panoptic-fpn_r50_fpn_1x_coco.py",
}


def network(name: str) -> nn.Module:
    """One of the two R50 models with fresh weights."""
    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet")
    torch.manual_seed(0)
    config = Config.fromfile(ROOT / NETWORKS[name])
    config.model.backbone.init_cfg = None
    model = MODELS.build(config.model)
    # Scores start at their prior: no box is predicted by either, so the work does not hang on random boxes.
    model.init_weights()
    return model


def real_image(side: int) -> dict[str, list]:
    """One annotated COCO image, its longer side as given."""
    from mmdet.registry import DATASETS
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet")
    folder = data_set("panopticapi_sample")
    pipeline = [
        dict(type="LoadImageFromFile"),
        dict(type="LoadPanopticAnnotations"),
        dict(type="Resize", scale=(side, side), keep_ratio=True),
        dict(type="PackDetInputs"),
    ]
    dataset = DATASETS.build(
        dict(
            type="PanopticDataset",
            data_root=str(folder),
            ann_file="panoptic_examples.json",
            data_prefix=dict(img="input_images/", seg="panoptic_examples/"),
            pipeline=pipeline,
        )
    )
    item = dataset[0]
    return {key: [item[key]] for key in ("inputs", "data_samples")}


def training_step(model: nn.Module, batch: dict[str, list]) -> None:
    """Losses and gradients of one image."""
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    loss, _ = model.parse_losses(model.loss(data["inputs"], data["data_samples"]))
    model.zero_grad(set_to_none=True)
    loss.backward()


def prediction(model: nn.Module, batch: dict[str, list]) -> None:
    """Panoptic map of one image."""
    with torch.no_grad():
        model.eval().test_step(copy.deepcopy(batch))
    model.train()


def dense_gmacs(model: nn.Module, height: int = 800, width: int = 1344) -> float:
    """Multiply-adds of all that runs once an image (not once a region), counted without computing."""
    from torch.utils.flop_counter import FlopCounterMode

    model = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        x = model.extract_feat(torch.zeros(1, 3, height, width, device="meta"))
        if hasattr(model, "rpn_head"):
            model.rpn_head(x)
            model.semantic_head(x)
        else:
            model.semantic_head(model.bbox_head(x)[2])
    return counter.get_total_flops() / 2e9


def network_rows(rounds: int, raw: dict, side: int) -> list[list[str]]:
    """A training step and a prediction."""
    batch = real_image(side)
    models = {name: network(name).train() for name in NETWORKS}
    peaks = {
        f"{name} {work}": float(
            subprocess.run(
                [sys.executable, "-m", "benchmarks.spatialflow", "--peak", name, work, "--side", str(side)],
                cwd=ROOT,
                check=True,
                capture_output=True,
                text=True,
            ).stdout.split()[-1]
        )
        for name in NETWORKS
        for work in ("step", "prediction")
    }
    gmacs = {name: dense_gmacs(model) for name, model in models.items()}
    ours, rival = gmacs.values()
    rows = [
        [
            "R50, GMAC at 800x1344 without regions: PanopticFPN",
            f"{ours:.0f}",
            f"{rival:.0f}",
            f"{rival / ours:.2f}",
            "",
        ]
    ]
    raw["network"] = {"gmacs": gmacs, "peak_mib": peaks, "side": side}
    for work, run in (("step", training_step), ("prediction", prediction)):
        times = cpu_times(
            {name: functools.partial(run, model, batch) for name, model in models.items()}, rounds
        )
        raw["network"][work] = times
        rows.append(
            [
                f"R50, {'training step' if work == 'step' else 'prediction'}, one image of {side} pixels, "
                f"s: PanopticFPN",
                f"{statistics.median(times['SpatialFlow']):.2f}",
                f"{statistics.median(times['PanopticFPN']):.2f}",
                spread([b / a for a, b in zip(times["SpatialFlow"], times["PanopticFPN"], strict=True)]),
                f"{peaks[f'SpatialFlow {work}']:.0f} / {peaks[f'PanopticFPN {work}']:.0f}",
            ]
        )
    return rows


def main(argv: Sequence[str]) -> int:
    """Measure, print one JSON line, write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--side", type=int, default=256, help="longer side of the network's input")
    parser.add_argument("--short", action="store_true", help="one turn at small sizes; writes no result")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.peak:
        model, batch = network(args.peak[0]).train(), real_image(args.side)
        # getrusage's peak begins with that of the process that started this one.
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        (training_step if args.peak[1] == "step" else prediction)(model, batch)
        print((_status("VmHWM") - before) / 1024)
        return 0
    rounds, side = (1, 64) if args.short else (args.rounds, args.side)
    sizes = [(120, 160)] if args.short else [(480, 640), (1024, 2048)]
    raw: dict[str, Any] = {}
    rows = [*quality_rows(rounds, raw), *fusion_rows(rounds, raw, sizes), *network_rows(rounds, raw, side)]
    for row in rows:
        print("  ".join(f"{cell:<28}" for cell in row))
    with tempfile.TemporaryDirectory() as folder:
        path = write_result(
            "spatialflow_cost",
            command="python -m benchmarks.spatialflow",
            config={"rounds": rounds, "side": side, "sizes": sizes, "networks": NETWORKS},
            seeds=[0],
            packages=("mmdet", "mmengine", "numpy"),
            columns=COLUMNS,
            rows=rows,
            notes=[
                "CPU time on one thread, sides in turns, medians; ratio with smallest and largest of the "
                "turns. Results of all sides are compared before time is taken: equal maps, equal quality.",
                "Quality: 15 annotated COCO images, predictions made of the annotation; reading of PNGs, "
                "which panopticapi does for the prediction as well, is left out on every side. Peak: "
                "NumPy's.",
                "Network: fresh weights, one real image of which masks of the annotated objects are "
                "learned; in the prediction neither finds an object, PanopticFPN runs its box head over its "
                "proposals. Peak: growth of the process in a process of its own, from the built model on.",
            ],
            details=raw,
            folder=Path(folder) if args.short else RESULTS,
        )
        print(json.dumps(json.loads(path.read_text())["table"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
