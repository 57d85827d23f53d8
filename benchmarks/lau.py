"""Speed and memory of LaU: the operator and the targets of its loss, against what others do in the same run.

Operator, forward and backward: ours, `F.grid_sample` with the grid it needs, and a literal restatement of the
authors' op, which copies the offsets once per channel. Loss targets: ours, and the literal five enlarged maps
with their log-softmaxes. Cross entropy: enlarged logits first, or piece by piece. Every side runs in turns;
memory is that of a fresh process. Writes ``docs/results/lau_op.json``.

Where there is a CUDA device, the Triton kernels are measured too, against the plain path, `F.grid_sample` and
the time that the bytes they must move would take: ``docs/results/lau_gpu.json``.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.record import RESULTS, spread, write_result  # noqa: E402

# Images, classes, cells, factor: the paper's shapes with fewer images; Cityscapes at half the side.
SHAPES = {
    "PASCAL Context": (2, 59, (60, 60), 4),
    "ADE20K": (2, 150, (64, 64), 4),
    "ADE20K, k=8": (1, 150, (32, 32), 8),
    "Cityscapes": (2, 19, (32, 64), 8),
    "features": (2, 256, (32, 32), 4),
}
SHORT = {"small": (1, 19, (16, 16), 4)}
Case = tuple[int, int, tuple[int, int], int]


def inputs(case: Case, *, sigma: float = 0.5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits and offsets with gradient, labels, and a gradient for the enlarged map."""
    images, classes, (rows, columns), k = case
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, classes, rows, columns, generator=generator).requires_grad_()
    size = (k * rows, k * columns)
    offset = (sigma * torch.randn(images, 2, *size, generator=generator)).requires_grad_()
    label = torch.randint(classes, (images, *size), generator=generator)
    return x, offset, label, torch.randn(images, classes, *size, generator=generator)


def literal_op(x: Tensor, offset: Tensor, k: int) -> Tensor:
    """The authors' op in plain PyTorch: one copy of both offsets per channel, four gathered corners."""
    images, classes, rows, columns = x.shape
    height, width = offset.shape[2:]
    dy, dx = (part.repeat(1, classes, 1, 1) for part in offset.split(1, dim=1))
    sy = (dy + torch.arange(height)[:, None] / k).clamp(0, rows - 1)
    sx = (dx + torch.arange(width) / k).clamp(0, columns - 1)
    y0, x0 = sy.floor().detach(), sx.floor().detach()
    y1, x1 = sy.ceil().detach(), sx.ceil().detach()
    a, b = sy - y0, sx - x0
    flat = x.flatten(2)

    def corner(y: Tensor, x_: Tensor) -> Tensor:
        return flat.gather(2, (y * columns + x_).long().flatten(2)).view(images, classes, height, width)

    top = (1 - b) * corner(y0, x0) + b * corner(y0, x1)
    return (1 - a) * top + a * ((1 - b) * corner(y1, x0) + b * corner(y1, x1))


def grid_op(x: Tensor, offset: Tensor, k: int) -> Tensor:
    """`F.grid_sample`, with the grid that it needs."""
    from mm_plugins.lau.sampling import grid_sample_upsample

    return grid_sample_upsample(x, offset, scale_factor=k)


def our_op(x: Tensor, offset: Tensor, k: int) -> Tensor:
    """The operator of this suite."""
    from mm_plugins.lau.sampling import location_aware_upsample

    return location_aware_upsample(x, offset, scale_factor=k)


def own_loss(x: Tensor, offset: Tensor, label: Tensor, k: int) -> Tensor:
    """What the targets start from; the main loss has it anyway, so neither side counts it."""
    with torch.no_grad():
        return F.cross_entropy(grid_op(x, offset, k), label, reduction="none", ignore_index=255)


def literal_targets(x: Tensor, offset: Tensor, label: Tensor, own: Tensor, k: int) -> Tensor:
    """Targets of the regression loss as in the authors' release: five enlarged maps, a log-softmax each.

    The bilinear one is computed and not used there; the sixth is that of the main loss.
    """
    with torch.no_grad():
        images, _, rows, columns = x.shape
        height, width = label.shape[1:]
        p, q = torch.arange(height) / k, torch.arange(width) / k
        F.cross_entropy(grid_op(x, torch.zeros_like(offset), k), label, reduction="none", ignore_index=255)
        best, target = own.clone(), offset.detach().clone()
        for round_y in (torch.floor, torch.ceil):
            for round_x in (torch.floor, torch.ceil):
                y, x_ = round_y(p).clamp(max=rows - 1), round_x(q).clamp(max=columns - 1)
                corner = x[:, :, y.long()][..., x_.long()]
                loss = F.cross_entropy(corner, label, reduction="none", ignore_index=255)
                better = loss < best
                step = torch.stack(torch.broadcast_tensors((y - p)[:, None], x_ - q))
                target = torch.where(better[:, None], step.expand_as(target), target)
                best = torch.where(better, loss, best)
        return target


def our_targets(x: Tensor, offset: Tensor, label: Tensor, own: Tensor, k: int) -> Tensor:
    """Targets of this suite."""
    from mm_plugins.lau.location_loss import location_targets

    with torch.no_grad():
        return location_targets(x, offset, label, own, scale=(k, k)).offset_N2HW


def loss_of_enlarged(x: Tensor, offset: Tensor, label: Tensor, k: int) -> Tensor:
    """Enlarge with `F.grid_sample`, then cross entropy."""
    return F.cross_entropy(grid_op(x, offset, k), label, ignore_index=255)


def loss_in_pieces(x: Tensor, offset: Tensor, label: Tensor, k: int) -> Tensor:
    """The fused loss of this suite (``fused=True`` in a head)."""
    from mm_plugins.lau.sampled_loss import sampled_cross_entropy

    return sampled_cross_entropy(x, offset, label, scale=(k, k))[0].mean()


OPERATORS = {"authors' op": literal_op, "grid_sample": grid_op, "ours": our_op}
TARGETS = {"six log-softmaxes": literal_targets, "ours": our_targets}
# What is measured, and how its rows begin.
TITLES = {"operator": "operator, ", "targets": "loss targets, ", "loss": "LaU + cross entropy, "}
LOSSES = {"enlarged": loss_of_enlarged, "in pieces": loss_in_pieces}


def step(part: str, side: str, case: Case) -> Callable[[], dict[str, float]]:
    """One run of a side: seconds of CPU time and of clock time of its forward and backward."""
    x, offset, label, grad = inputs(case)
    k = case[3]
    own = own_loss(x, offset, label, k) if part == "targets" else label

    def run() -> dict[str, float]:
        marks = [_clocks()]
        if part == "targets":
            TARGETS[side](x, offset, label, own, k)
            marks.append(_clocks())
        elif part == "operator":
            out = OPERATORS[side](x, offset, k)
            marks.append(_clocks())
            torch.autograd.grad(out, (x, offset), grad)
            marks.append(_clocks())
        else:
            out = LOSSES[side](x, offset, label, k)
            marks.append(_clocks())
            torch.autograd.grad(out, (x, offset))
            marks.append(_clocks())
        return {
            name + clock: after[clock] - before[clock]
            for name, before, after in zip(("forward", "backward"), marks, marks[1:], strict=False)
            for clock in before
        }

    return run


def _clocks() -> dict[str, float]:
    """CPU time of this process, and the clock."""
    return {"": time.process_time(), " (clock)": time.perf_counter()}


def peak_mb(part: str, side: str, case: Case) -> float:
    """Peak memory of one run in a process of its own beyond what its inputs take, in MB."""
    # Forked, so that it starts with the libraries loaded; the parent has run nothing large before.
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(send, part, side, case))
    process.start()
    found = receive.recv()
    process.join()
    return found


def _child(send: Connection, part: str, side: str, case: Case) -> None:
    step(part, side, (1, 3, (4, 4), 2))()
    run = step(part, side, case)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    send.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def in_turns(part: str, sides: Sequence[str], case: Case, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Times of all sides; the first turn of each is not counted."""
    runs = {side: step(part, side, case) for side in sides}
    times: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for turn in range(rounds + 1):
        for side, run in runs.items():
            found = run()
            if turn:
                times[side].append(found)
    return times


def ratios(times: dict[str, list[dict[str, float]]], other: str, ours: str, key: str) -> list[float]:
    """How many times longer `other` took than `ours`, turn by turn."""
    return [a[key] / b[key] for a, b in zip(times[other], times[ours], strict=True)]


def clock_ratios(times: dict[str, list[dict[str, float]]], other: str, ours: str) -> str:
    """The same by the clock: medians of forward and backward."""
    both = (ratios(times, other, ours, key + " (clock)") for key in ("forward", "backward"))
    return ", ".join(f"{statistics.median(values):.3g}" for values in both)


def operator_rows(
    name: str, case: Case, rounds: int, memory: Mapping[str, float]
) -> tuple[list[list[str]], dict]:
    """Time and memory of the operator against both others."""
    times = in_turns("operator", list(OPERATORS), case, rounds)
    rows = [
        [
            f"operator, {name}",
            other,
            spread(ratios(times, other, "ours", "forward")),
            spread(ratios(times, other, "ours", "backward")),
            clock_ratios(times, other, "ours"),
            f"{memory[other]:.0f} / {memory['ours']:.0f}",
        ]
        for other in ("authors' op", "grid_sample")
    ]
    return rows, {"seconds": times, "peak_mb": dict(memory)}


def targets_row(
    name: str, case: Case, rounds: int, memory: Mapping[str, float]
) -> tuple[list[list[str]], dict]:
    """Time and memory of the loss targets, without the own loss that both sides are given."""
    times = in_turns("targets", list(TARGETS), case, rounds)
    row = [
        f"loss targets, {name}",
        "six log-softmaxes",
        spread(ratios(times, "six log-softmaxes", "ours", "forward")),
        "",
        f"{statistics.median(ratios(times, 'six log-softmaxes', 'ours', 'forward (clock)')):.3g}",
        f"{memory['six log-softmaxes']:.0f} / {memory['ours']:.0f}",
    ]
    return [row], {"seconds": times, "peak_mb": dict(memory)}


def loss_row(name: str, case: Case, rounds: int, memory: Mapping[str, float]) -> tuple[list[list[str]], dict]:
    """Time and memory of the fused cross entropy."""
    times = in_turns("loss", list(LOSSES), case, rounds)
    row = [
        f"LaU + cross entropy, {name}",
        "grid_sample, then loss",
        spread(ratios(times, "enlarged", "in pieces", "forward")),
        spread(ratios(times, "enlarged", "in pieces", "backward")),
        clock_ratios(times, "enlarged", "in pieces"),
        f"{memory['enlarged']:.0f} / {memory['in pieces']:.0f}",
    ]
    return [row], {"seconds": times, "peak_mb": dict(memory)}


def median_seconds(run: Callable[[], object]) -> float:
    """Median seconds of a call, the device's work included."""
    return Timer("run()", globals={"run": run}).blocked_autorange(min_run_time=0.5).median


def seconds_per_byte(device: str) -> float:
    """What moving a byte takes: a large copy reads and writes each of its bytes once."""
    source = torch.empty(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return median_seconds(lambda: target.copy_(source)) / (2 * source.numel())


def device_times(case: Case, device: str, backends: Sequence[str], per_byte: float) -> dict[str, float]:
    """Operator and fused loss on a device: seconds of each backend, and of the bytes that must move.

    Forward must write the output and read the map and the offsets; backward must read the gradient of the
    output and both inputs, and write both gradients. The fused loss has no such bound worth the name: it
    computes an exponential for each logit and moves next to nothing.
    """
    from mm_plugins.lau.sampled_loss import FUSED_BACKENDS, sampled_cross_entropy
    from mm_plugins.lau.sampling import location_aware_upsample

    x, offset, label, grad = (t.detach().to(device) for t in inputs(case))
    x.requires_grad_(), offset.requires_grad_()
    k, small, large = case[3], 4 * (x.numel() + offset.numel()), 4 * grad.numel()
    found = {"bound, forward": per_byte * (small + large), "bound, backward": per_byte * (2 * small + large)}

    def forward(backend: str) -> Tensor:
        return location_aware_upsample(x, offset, scale_factor=k, backend=backend)

    def backward(out: Tensor) -> None:
        torch.autograd.grad(out, (x, offset), grad, retain_graph=True)

    def fused(backend: str) -> None:
        loss, _ = sampled_cross_entropy(x, offset, label, scale=(k, k), backend=backend)
        torch.autograd.grad(loss.sum(), (x, offset))

    for backend in backends:
        found[f"{backend}, forward"] = median_seconds(partial(forward, backend))
        found[f"{backend}, backward"] = median_seconds(partial(backward, forward(backend)))
        if backend in FUSED_BACKENDS:
            found[f"{backend}, loss forward and backward"] = median_seconds(partial(fused, backend))
    return found


def measure_gpu(folder: Path) -> None:
    """The kernels on the CUDA device of this machine."""
    cases = {name: (8, *case[1:]) for name, case in SHAPES.items()}
    per_byte, backends = seconds_per_byte("cuda"), ("grid_sample", "rows", "triton")
    found = {name: device_times(case, "cuda", backends, per_byte) for name, case in cases.items()}
    rows = [
        [name, what, f"{1000 * seconds:.3g}"]
        for name, times in found.items()
        for what, seconds in times.items()
    ]
    write_result(
        "lau_gpu",
        command="python -m benchmarks.lau",
        config={"shapes": {name: list(case) for name, case in cases.items()}},
        seeds=[0],
        packages=("triton",),
        columns=["shape", "what", "ms, median"],
        rows=rows,
        notes=["fp32; the bound is the time of a plain copy of the bytes that the operator must move."],
        details=found,
        folder=folder,
    )


def rows_to_keep(path: Path, parts: Sequence[str]) -> tuple[list[list[str]], dict[str, dict]]:
    """Rows and raw figures of an earlier run of the parts that are not measured now."""
    if set(parts) == set(TITLES):
        return [], {}
    record = json.loads(path.read_text(encoding="utf-8"))
    titles = tuple(TITLES[part] for part in TITLES if part not in parts)
    rows = [row for row in record["table"]["rows"] if row[0].startswith(titles)]
    return rows, {key: value for key, value in record["details"].items() if key.split(", ")[0] not in parts}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the result file, print one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=list(TITLES), default=list(TITLES))
    parser.add_argument("--rounds", type=int, default=5, help="counted turns of each side")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--short", action="store_true", help="one small shape, two turns, result not kept")
    args = parser.parse_args(argv)
    shapes = SHAPES
    if args.short:
        shapes, args.rounds, args.out = SHORT, 2, Path(tempfile.mkdtemp(prefix="benchmark-"))
    torch.set_num_threads(1)
    import mm_plugins.lau  # noqa: F401  (before the processes that measure memory are forked)

    sides = {"operator": OPERATORS, "targets": TARGETS, "loss": LOSSES}
    measures = {"operator": operator_rows, "targets": targets_row, "loss": loss_row}
    jobs = [
        (part, name) for part in args.parts for name in shapes if name != "features" or part == "operator"
    ]
    # All memory first: afterwards a forked process would reuse what the timings have left behind.
    memory = {
        (part, name): {side: peak_mb(part, side, shapes[name]) for side in sides[part]} for part, name in jobs
    }
    rows, found = rows_to_keep(args.out / "lau_op.json", args.parts)
    for part, name in jobs:
        made, found[f"{part}, {name}"] = measures[part](name, shapes[name], args.rounds, memory[part, name])
        rows += made
    rows.sort(key=lambda row: [row[0].startswith(title) for title in TITLES.values()], reverse=True)
    listed = "; ".join(
        f"{name} {n}, {c}, {cells[0]}x{cells[1]}, {k}" for name, (n, c, cells, k) in shapes.items()
    )
    path = write_result(
        "lau_op",
        command=f"python -m benchmarks.lau --rounds {args.rounds}",
        config={"shapes": {name: list(case) for name, case in shapes.items()}, "rounds": args.rounds},
        seeds=[0],
        packages=("numpy",),
        columns=[
            "what, shape",
            "against",
            "times faster, forward: median (range)",
            "times faster, backward",
            "the same by the clock: forward, backward",
            "peak MB (other / ours)",
        ],
        rows=rows,
        notes=[
            f"Shapes (images, channels, cells, k): {listed}. One thread, fp32, sides in turns; CPU time, and "
            "medians by the clock beside it, on a machine with other work; memory is the growth of a process "
            "beyond its inputs, forward and backward; the targets are given the own loss that the main loss "
            "has anyway, and their memory is what they need beyond the peak of computing that."
        ],
        details=found,
        folder=args.out,
    )
    if torch.cuda.is_available() and not args.short:
        measure_gpu(args.out)
    print(json.dumps({"benchmark": "lau_op", "result": path.name, "rows": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
