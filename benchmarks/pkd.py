"""The loss of PKD against a literal restatement of the authors' formula, in one run: memory kept for
backward, time, values.

``python benchmarks/pkd.py`` measures the feature maps of two 800 x 1333 images (P2..P5 and P3..P6, 256
channels); ``--scale 0.25`` takes a quarter of both sides. Prints one JSON line and writes
``docs/results/pkd_loss.json``.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.record import RESULTS, spread, write_result
from mm_plugins.pkd.pearson import standardised_mse

IMAGE = (800, 1344)
PYRAMIDS = {"P2-P5": (4, 8, 16, 32), "P3-P6": (8, 16, 32, 64)}
SWIN_CASE = "P3-P6 student, P2-P5 teacher"

Loss = Callable[[Tensor, Tensor], Tensor]


def literal(student: Tensor, teacher: Tensor) -> Tensor:
    """The authors' formula in tensor form, differentiated by autograd: resize, standardise per channel, mse /
    2."""
    if student.shape[2:] != teacher.shape[2:]:
        student = F.interpolate(student, teacher.shape[2:], mode="bilinear")

    def standardise(x: Tensor) -> Tensor:
        flat = x.permute(1, 0, 2, 3).reshape(x.shape[1], -1)
        flat = (flat - flat.mean(-1, keepdim=True)) / (flat.std(-1, keepdim=True) + 1e-6)
        return flat.reshape(x.shape[1], x.shape[0], *x.shape[2:]).permute(1, 0, 2, 3)

    return F.mse_loss(standardise(student), standardise(teacher)) / 2


def ours(student: Tensor, teacher: Tensor) -> Tensor:
    """The closed form of this suite."""
    return standardised_mse(student, teacher).loss


def maps(strides: Sequence[int], *, scale: float, channels: int, seed: int, device: str) -> list[Tensor]:
    """Random maps of a pyramid for two images, one per stride."""
    generator = torch.Generator(device).manual_seed(seed)
    sizes = [[max(1, -(-int(side * scale) // stride)) for side in IMAGE] for stride in strides]
    return [torch.randn(2, channels, *size, generator=generator, device=device) for size in sizes]


def kept_for_backward(loss: Loss, students: list[Tensor], teachers: list[Tensor]) -> tuple[float, int]:
    """Feature-sized tensors per level, and bytes in all, that autograd keeps beyond the inputs."""
    inputs = {x.untyped_storage().data_ptr() for x in (*students, *teachers)}
    storages: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        # Kept alive, so that no two tensors share an address one after the other.
        alive.append(x)
        pointer = x.untyped_storage().data_ptr()
        if pointer not in inputs:
            storages[pointer] = x.untyped_storage().nbytes()
        return x

    large = 0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        for student, teacher in zip(students, teachers, strict=True):
            before = set(storages)
            result = loss(student, teacher)
            alive.append(result)
            feature = min(student.untyped_storage().nbytes(), teacher.untyped_storage().nbytes())
            large += sum(storages[pointer] >= feature for pointer in set(storages) - before)
    return large / len(students), sum(storages.values())


def seconds(loss: Loss, students: list[Tensor], teachers: list[Tensor]) -> float:
    """Time of one forward and backward over all levels."""
    for student in students:
        student.grad = None
    cuda = students[0].is_cuda
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    sum(loss(s, t) for s, t in zip(students, teachers, strict=True)).backward()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(students: list[Tensor], teachers: list[Tensor], *, rounds: int) -> dict:
    """All figures of one case; the two sides take turns, and the first turn of each is not counted."""
    for student in students:
        student.requires_grad_()
    values, grads = {}, {}
    for name, loss in (("literal", literal), ("ours", ours)):
        total = sum(loss(s, t) for s, t in zip(students, teachers, strict=True))
        grads[name] = torch.cat([x.flatten() for x in torch.autograd.grad(total, students)])
        values[name] = total.item()
    gradient_error = float((grads["ours"] - grads["literal"]).norm() / grads["literal"].norm())
    del grads
    times: dict[str, list[float]] = {"literal": [], "ours": []}
    for turn in range(rounds + 1):
        for name, loss in (("literal", literal), ("ours", ours)):
            elapsed = seconds(loss, students, teachers)
            if turn:
                times[name].append(elapsed)
    ratios = [a / b for a, b in zip(times["literal"], times["ours"], strict=True)]
    kept = {
        name: kept_for_backward(loss, students, teachers)
        for name, loss in (("literal", literal), ("ours", ours))
    }
    return {
        "kept_maps": {name: count for name, (count, _) in kept.items()},
        "kept_bytes": {name: size for name, (_, size) in kept.items()},
        "seconds": times,
        "speedup": {"median": statistics.median(ratios), "all": ratios},
        "value_difference": abs(values["ours"] - values["literal"]),
        "gradient_difference": gradient_error,
    }


def cases(*, scale: float, channels: int, device: str) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """Student and teacher maps: the two pyramids, and the pair whose student is resized."""
    made = {
        name: tuple(
            maps(strides, scale=scale, channels=channels, seed=seed, device=device) for seed in (0, 1)
        )
        for name, strides in PYRAMIDS.items()
    }
    made[SWIN_CASE] = (
        maps(PYRAMIDS["P3-P6"], scale=scale, channels=channels, seed=0, device=device),
        maps(PYRAMIDS["P2-P5"], scale=scale, channels=channels, seed=1, device=device),
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the result file, print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of the image's sides, for small machines"
    )
    parser.add_argument("--channels", type=int, default=256, help="channels of each map")
    parser.add_argument("--rounds", type=int, default=5, help="counted turns of each side")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--short", action="store_true", help="small maps, two rounds, result not kept")
    args = parser.parse_args(argv)
    if args.short:
        args.scale, args.rounds, args.out = 0.25, 2, Path(tempfile.mkdtemp(prefix="benchmark-"))
    torch.set_num_threads(args.threads)
    found = {}
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for name in [*PYRAMIDS, SWIN_CASE]:
            pair = cases(scale=args.scale, channels=args.channels, device=device)[name]
            found[f"{name}, {device}"] = compare(*pair, rounds=args.rounds)
    rows = [
        [
            name,
            f"{case['kept_maps']['literal']:.2g} / {case['kept_maps']['ours']:.2g}",
            f"{case['kept_bytes']['literal'] / 1e6:.1f} / {case['kept_bytes']['ours'] / 1e6:.2f}",
            spread(case["speedup"]["all"]),
            f"{case['value_difference']:.1e}",
            f"{case['gradient_difference']:.1e}",
        ]
        for name, case in found.items()
    ]
    path = write_result(
        "pkd_loss",
        command=f"python benchmarks/pkd.py --scale {args.scale:g} --rounds {args.rounds} "
        f"--threads {args.threads}",
        config={
            "image": IMAGE,
            "scale": args.scale,
            "batch": 2,
            "channels": args.channels,
            "rounds": args.rounds,
            "threads": args.threads,
        },
        seeds=[0, 1],
        packages=(),
        columns=[
            "levels, device",
            "maps kept per level (formula / ours)",
            "MB kept (formula / ours)",
            "times faster, median (range)",
            "value difference",
            "gradient difference (relative)",
        ],
        rows=rows,
        notes=[
            "Forward and backward of the loss over four levels, in turns with a literal restatement of the "
            "authors' formula; kept means saved by autograd for backward beyond the two inputs."
        ],
        details=found,
        folder=args.out,
    )
    summary = {
        name: {"speedup": case["speedup"]["median"], **case["kept_bytes"]} for name, case in found.items()
    }
    print(json.dumps({"benchmark": "pkd_loss", "result": path.name, "cases": summary}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
