"""Gradients of each image of a DPNASNet: ours against Opacus' own samplers and a plain step, in one run.

Prints one JSON line and writes ``docs/results/dpnas.json`` (``--short``: prints only).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

from benchmarks.record import spread, write_result
from hf_plugins.dp.model import attach
from hf_plugins.dpnas.model import DPNASNetConfig, DPNASNetForImageClassification


def steps(preset: str, batch: int) -> dict[str, Callable[[], None]]:
    """One step of each way on the same images: plain backward, Opacus, ours."""
    torch.manual_seed(0)
    shape = DPNASNetConfig.preset(preset)
    images = torch.randn(batch, shape.in_channels, shape.image_size, shape.image_size)
    labels = torch.randint(10, (batch,))

    def losses(model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(model(pixel_values=images).logits, labels, reduction="none")

    plain, opacus, ours = (DPNASNetForImageClassification(shape).train() for _ in range(3))
    wrapped = GradSampleModule(opacus, loss_reduction="sum")
    engine = attach(ours, mode="hooks", max_grad_norm=0.1, ghost_fault=None)
    units = torch.arange(batch)

    def step_plain() -> None:
        plain.zero_grad()
        losses(plain).sum().backward()

    def step_opacus() -> None:
        wrapped.zero_grad()
        losses(wrapped).sum().backward()
        grads = [p.grad_sample for p in opacus.parameters()]
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads]).norm(dim=0)
        factors = (0.1 / norms).clamp(max=1)
        for g in grads:
            torch.einsum("n,n...->...", factors, g)

    def step_ours() -> None:
        engine.start(batch)
        engine.backward(losses(ours), units, batch)

    return {"plain": step_plain, "opacus": step_opacus, "ours": step_ours}


def measure(preset: str, batch: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds an image of each way, in turns."""
    ways = steps(preset, batch)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, step in ways.items():
            start = time.process_time()
            step()
            # The first round warms up caches and kernels.
            if number:
                found[name].append(1000 * (time.process_time() - start) / batch)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure both shapes and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="one small round; writes no result")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(argv)
    if options.short:
        options.batch, options.rounds = 8, 1
    torch.set_num_threads(1)
    rows, details = [], {}
    for preset in ("mnist", "cifar10"):
        times = measure(preset, options.batch, options.rounds)
        ratios = [b / a for a, b in zip(times["ours"], times["opacus"], strict=True)]
        extra = [b / a for a, b in zip(times["plain"], times["ours"], strict=True)]
        rows.append(
            [
                preset,
                *(f"{statistics.median(times[way]):.2f}" for way in times),
                spread(ratios),
                spread(extra),
            ]
        )
        details[preset] = times
    print(json.dumps({"benchmark": "dpnas", "ms_per_image": details}))
    if not options.short:
        write_result(
            "dpnas",
            command="python -m benchmarks.dpnas",
            config={"batch": options.batch, "rounds": options.rounds, "threads": 1, "max_grad_norm": 0.1},
            seeds=[0],
            packages=("opacus", "transformers"),
            columns=(
                "network",
                "plain step, ms an image",
                "Opacus, ms",
                "ours, ms",
                "Opacus / ours",
                "ours / plain",
            ),
            rows=rows,
            notes=["CPU time of forward, backward and clipping; both ways get the same images and network."],
            details=details,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
