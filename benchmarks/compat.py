"""Speed of the portable ops, alone or against a compiled mmcv in another interpreter.

    python benchmarks/compat.py --reference-python PATH

Both interpreters get the same inputs and run in turns, on one thread each; times are CPU seconds of the
process, which a busy machine does not stretch. Writes a result file and prints one JSON line. A ratio below 1
means that the portable op is the faster one.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.record import RESULTS, write_result  # noqa: E402

SEED = 0
Run = Callable[..., Tensor | tuple[Tensor, ...]]
Case = tuple[Run, list[Tensor]]
"""The op as a function of the inputs that get a gradient, and those inputs (none: no backward)."""


def _boxes(num_boxes: int, spread: float, size: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    corner = torch.rand(num_boxes, 2, generator=generator) * spread
    boxes = torch.cat([corner, corner + torch.rand(num_boxes, 2, generator=generator) * size], 1)
    return boxes, torch.randperm(num_boxes, generator=generator) / num_boxes


def _rois(
    num_rois: int, num_images: int, extent: tuple[float, float], size: float, g: torch.Generator
) -> Tensor:
    corner = torch.rand(num_rois, 2, generator=g) * torch.tensor(extent)
    image = torch.randint(0, num_images, (num_rois, 1), generator=g)
    return torch.cat([image, corner, corner + (0.5 + torch.rand(num_rois, 2, generator=g)) * size], 1)


def nms_case(spread: float, size: float) -> Case:
    """Greedy suppression of boxes up to ``size`` wide, spread over ``spread`` pixels."""
    from mmcv.ops import nms

    boxes, scores = _boxes(10_000, spread, size, torch.Generator().manual_seed(SEED))
    return lambda: nms(boxes, scores, 0.5), []


def soft_nms_case() -> Case:
    """Linear soft suppression."""
    from mmcv.ops import soft_nms

    boxes, scores = _boxes(1000, 400, 100, torch.Generator().manual_seed(SEED))
    return lambda: soft_nms(boxes, scores, 0.3, method="linear"), []


def nms_match_case() -> Case:
    """Greedy suppression with its groups."""
    from mmcv.ops import nms_match

    boxes, scores = _boxes(2000, 400, 100, torch.Generator().manual_seed(SEED))
    dets = torch.cat([boxes, scores[:, None]], 1)
    return lambda: torch.cat(nms_match(dets, 0.5)), []


def overlaps_case() -> Case:
    """All pairs of two sets of boxes."""
    from mmcv.ops import bbox_overlaps

    generator = torch.Generator().manual_seed(SEED)
    (first, _), (second, _) = _boxes(2000, 400, 100, generator), _boxes(1000, 400, 100, generator)
    return lambda: bbox_overlaps(first, second), []


def roi_align_case(
    shape: tuple[int, int, int, int],
    num_rois: int,
    size: float,
    bins: int,
    ratio: int,
    mode: str = "avg",
    scale: float = 0.25,
    needs_grad: bool = True,
) -> Case:
    """RoIAlign of ``num_rois`` regions about ``size`` picture pixels wide."""
    from mmcv.ops import roi_align

    generator = torch.Generator().manual_seed(SEED)
    maps = torch.randn(shape, generator=generator)
    extent = (shape[3] / scale - 1.5 * size, shape[2] / scale - 1.5 * size)
    rois = _rois(num_rois, shape[0], extent, size, generator)
    if not needs_grad:
        return lambda: roi_align(maps, rois, bins, scale, ratio, mode, True), []
    return lambda x: roi_align(x, rois, bins, scale, ratio, mode, True), [maps]


def deform_conv_case(modulated: bool, deform_groups: int = 1) -> Case:
    """A 3 x 3 convolution of a ResNet stage at 1333 x 800, two images."""
    from mmcv.ops import deform_conv2d, modulated_deform_conv2d

    generator = torch.Generator().manual_seed(SEED)
    maps = torch.randn(2, 256, 50, 84, generator=generator)
    offset = torch.randn(2, 18 * deform_groups, 50, 84, generator=generator) * 2
    mask = torch.rand(2, 9 * deform_groups, 50, 84, generator=generator)
    weight = torch.randn(256, 256, 3, 3, generator=generator) * 0.02
    layout = (1, 1, 1, 1, deform_groups)
    if modulated:
        return lambda x, o, m, w: modulated_deform_conv2d(x, o, m, w, None, *layout), [
            maps,
            offset,
            mask,
            weight,
        ]
    return lambda x, o, w: deform_conv2d(x, o, w, *layout), [maps, offset, weight]


def psa_mask_case() -> Case:
    """The mask of PSANet on a 30 x 30 map."""
    from mmcv.ops import PSAMask

    masks = torch.randn(1, 59 * 59, 30, 30, generator=torch.Generator().manual_seed(SEED))
    return PSAMask("collect", (59, 59)), [masks]


def carafe_case() -> Case:
    """Upsampling of an FPN level."""
    from mmcv.ops import carafe

    generator = torch.Generator().manual_seed(SEED)
    maps = torch.randn(1, 256, 50, 84, generator=generator)
    masks = torch.randn(1, 25, 100, 168, generator=generator).softmax(1)
    return lambda x, m: carafe(x, m, 5, 1, 2), [maps, masks]


def ms_deform_attn_case() -> Case:
    """One encoder layer of Deformable DETR, four levels."""
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    generator = torch.Generator().manual_seed(SEED)
    shapes = torch.tensor([[50, 84], [25, 42], [13, 21], [7, 11]])
    sizes = shapes.prod(1)
    starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)[:-1]])
    num_pixels = int(sizes.sum())
    value = torch.randn(1, num_pixels, 8, 32, generator=generator)
    locations = torch.rand(1, num_pixels, 8, 4, 4, 2, generator=generator)
    weights = torch.rand(1, num_pixels, 8, 4, 4, generator=generator)

    def run(v: Tensor, points: Tensor, w: Tensor) -> Tensor:
        return MultiScaleDeformableAttnFunction.apply(v, shapes, starts, points, w, 64)

    return run, [value, locations, weights]


def focal_case() -> Case:
    """Focal loss of 20,000 anchors and 80 classes."""
    from mmcv.ops import sigmoid_focal_loss

    generator = torch.Generator().manual_seed(SEED)
    logits = torch.randn(20_000, 80, generator=generator)
    target = torch.randint(0, 81, (20_000,), generator=generator)
    return lambda x: sigmoid_focal_loss(x, target, 2.0, 0.25, None, "none"), [logits]


FPN_LEVEL = (2, 256, 100, 168)
CASES: dict[str, Callable[[], Case]] = {
    "nms 10k boxes": lambda: nms_case(1000, 100),
    "nms 10k boxes, nearly disjoint": lambda: nms_case(1000, 5),
    "nms 10k boxes, crowded": lambda: nms_case(200, 100),
    "soft_nms 1k boxes": soft_nms_case,
    "nms_match 2k boxes": nms_match_case,
    "bbox_overlaps 2000 x 1000": overlaps_case,
    "roi_align 256 rois, 7x7, 2 samples": lambda: roi_align_case(FPN_LEVEL, 256, 80, 7, 2),
    "roi_align 256 rois, 7x7, adaptive": lambda: roi_align_case(FPN_LEVEL, 256, 80, 7, 0),
    "roi_align 64 rois, 14x14, adaptive": lambda: roi_align_case(FPN_LEVEL, 64, 160, 14, 0),
    "roi_align 8 rois on a large map": lambda: roi_align_case((1, 256, 200, 336), 8, 80, 7, 0),
    "roi_align mask targets": lambda: roi_align_case(
        (8, 1, 800, 1333), 64, 200, 28, 0, scale=1, needs_grad=False
    ),
    "roi_align maximum": lambda: roi_align_case(FPN_LEVEL, 64, 80, 7, 2, "max"),
    "deform_conv": lambda: deform_conv_case(False),
    "deform_conv, 4 groups": lambda: deform_conv_case(False, 4),
    "modulated_deform_conv": lambda: deform_conv_case(True),
    "modulated_deform_conv, 4 groups": lambda: deform_conv_case(True, 4),
    "psa_mask": psa_mask_case,
    "carafe": carafe_case,
    "ms_deform_attn": ms_deform_attn_case,
    "sigmoid_focal_loss": focal_case,
}
WITHOUT_REFERENCE = ("carafe", "ms_deform_attn", "sigmoid_focal_loss")
"""mmcv has no CPU kernel for these, so that a compiled one cannot be compared."""


# Worker: answers requests of one line each.


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def measure(name: str, path: str | None) -> dict[str, float]:
    """Run a case once; CPU seconds of forward and backward, and all results into ``path`` if given."""
    run, inputs = CASES[name]()
    leaves = [x.requires_grad_(True) for x in inputs]
    forward, out = _timed(lambda: run(*leaves))
    times, results = {"forward": forward}, list(out if isinstance(out, tuple) else (out,))
    if leaves:
        top = torch.randn(results[0].shape, generator=torch.Generator().manual_seed(SEED + 1))
        times["backward"], grads = _timed(lambda: torch.autograd.grad(results[0], leaves, top))
        results.extend(grads)
    if path is not None:
        np.savez(path, *[r.detach().double().numpy() for r in results])
    return times


def serve(with_suite: bool) -> None:
    """Answer requests from stdin until it closes."""
    torch.set_num_threads(1)
    if with_suite:
        sys.path.insert(0, str(ROOT))
        import mm_plugins.compat  # noqa: F401
    import mmcv

    versions = {"python": platform.python_version(), "torch": torch.__version__, "mmcv": mmcv.__version__}
    print(json.dumps(versions), flush=True)
    for line in sys.stdin:
        answer = measure(**json.loads(line))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"times": answer, "peak_rss_kib": peak}), flush=True)


class Worker:
    """One interpreter that runs cases on request."""

    def __init__(self, python: str, with_suite: bool) -> None:
        command = [python, __file__, "--serve", "suite" if with_suite else "plain"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.peak_rss_kib = 0
        self.versions = self._read()

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(
                "a worker ended early; its error stands above. Does its interpreter import mmcv.ops?"
            )
        return json.loads(line)

    def run(self, name: str, path: str | None = None) -> dict[str, float]:
        """CPU seconds of the parts of a case."""
        self.process.stdin.write(json.dumps({"name": name, "path": path}) + "\n")
        self.process.stdin.flush()
        answer = self._read()
        self.peak_rss_kib = answer["peak_rss_kib"]
        return answer["times"]

    def close(self) -> None:
        """End the interpreter."""
        self.process.stdin.close()
        self.process.wait()


# Driver


def spread(values: list[float]) -> dict[str, float]:
    """Median with the smallest and the largest value."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def differences(ours: str, theirs: str) -> dict[str, float]:
    """Largest absolute difference of the first result (values) and of the others (gradients, indices)."""
    with np.load(ours) as first, np.load(theirs) as second:
        if any(first[name].shape != second[name].shape for name in first.files):
            return {"shapes_differ": 1.0}
        gaps = [float(np.abs(first[n] - second[n]).max(initial=0.0)) for n in first.files]
    return {"values": gaps[0], "gradients": max(gaps[1:], default=0.0)}


def compare(name: str, portable: Worker, reference: Worker | None, rounds: int) -> dict[str, Any]:
    """Times of one case, ratios of neighbouring runs, and differences of the results."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/portable.npz", f"{folder}/reference.npz"]
        portable.run(name, paths[0])
        gap = None
        if reference is not None:
            reference.run(name, paths[1])
            gap = differences(*paths)
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(portable.run(name))
        if reference is not None:
            theirs.append(reference.run(name))
    row: dict[str, Any] = {"max_abs_diff": gap} if gap else {}
    for part in ours[0]:
        row[part] = {"portable_s": spread([t[part] for t in ours])}
        if theirs:
            row[part]["reference_s"] = spread([t[part] for t in theirs])
            row[part]["ratio"] = spread([a[part] / b[part] for a, b in zip(ours, theirs, strict=True)])
    return row


def table_rows(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Rows of the docs' table: one case and part a row."""
    rows = []
    for name, row in results.items():
        gap = row.get("max_abs_diff")
        for part in ("forward", "backward"):
            if part not in row:
                continue
            times, ratio = row[part]["portable_s"], row[part].get("ratio")
            told = "no CPU kernel there"
            if ratio:
                told = f"{ratio['median']:.2g} ({ratio['min']:.2g}-{ratio['max']:.2g})"
            difference = "" if gap is None else f"{gap['values' if part == 'forward' else 'gradients']:.1e}"
            rows.append([name, part, f"{times['median']:.3g}", told, difference])
    return rows


def main(argv: list[str] | None = None) -> int:
    """Parse, measure, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference-python", help="Interpreter with a compiled mmcv to compare with.")
    parser.add_argument("--rounds", type=int, default=7, help="Timed runs of each case in each interpreter.")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--out", type=Path, default=RESULTS, help="Folder of the result file.")
    parser.add_argument("--short", action="store_true", help="Two cases, two rounds, result not kept.")
    parser.add_argument("--serve", choices=["suite", "plain"], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        serve(args.serve == "suite")
        return 0
    if args.short:
        args.cases, args.rounds, args.out = args.cases[:2], 2, Path(tempfile.mkdtemp(prefix="benchmark-"))
    portable = Worker(sys.executable, with_suite=True)
    reference = Worker(args.reference_python, with_suite=False) if args.reference_python else None
    results = {}
    for name in args.cases:
        peer = None if name in WITHOUT_REFERENCE else reference
        results[name] = compare(name, portable, peer, args.rounds)
        print(name, file=sys.stderr, flush=True)
    for worker in (portable, reference):
        if worker is not None:
            worker.close()
    path = write_result(
        "compat",
        command=f"python -m benchmarks.compat --rounds {args.rounds} --reference-python PYTHON",
        config={
            "rounds": args.rounds,
            "cases": args.cases,
            "threads": 1,
            "clock": "process CPU seconds",
            "reference": reference.versions if reference else None,
        },
        seeds=[SEED],
        packages=("mmcv-lite", "numpy"),
        columns=["case", "part", "portable, s", "portable / compiled, median (range)", "largest difference"],
        rows=table_rows(results),
        notes=[
            "One thread, both interpreters in turns on the same inputs; below 1 the portable op is faster "
            "than mmcv 2.1.0's compiled CPU op. PYTHON is an interpreter with a compiled mmcv."
        ],
        details={
            "results": results,
            "peak_rss_mib": {
                "portable": portable.peak_rss_kib / 1024,
                "reference": reference.peak_rss_kib / 1024 if reference else None,
            },
        },
        folder=args.out,
    )
    print(json.dumps({"benchmark": "compat", "result": path.name, "cases": len(results)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
