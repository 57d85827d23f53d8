"""How time and memory grow: one curve a method, each point in a process of its own, one thread.

``python -m benchmarks.scale`` runs every method's core at three sizes, notes CPU time and peak memory (above
that of the imports), fits the exponent of growth, and writes ``docs/results/scale.json``, with what the last
step of the curve amounts to at the size that users of the method have. That last column is arithmetic, not a
measurement: the largest point times the ratio of the sizes, which holds where the exponent is 1.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.record import write_result

Work = Callable[[], Any]


def pkd(pixels: int) -> Work:
    """The loss on one level of 256 channels, forward and backward."""
    from mm_plugins.pkd.pearson import standardised_mse

    side = math.isqrt(pixels)
    student = torch.randn(1, 256, side, side, requires_grad=True)
    teacher = torch.randn(1, 256, side, side)
    return lambda: standardised_mse(student, teacher).loss.backward()


def lau(pixels: int) -> Work:
    """Up-sampling 19 maps by 8 with learned offsets, forward and backward."""
    from mm_plugins.lau.upsample import LaUUpsample

    side = math.isqrt(pixels) // 8
    module = LaUUpsample(in_channels=19, scale_factor=8)
    x = torch.randn(1, 19, side, side, requires_grad=True)
    return lambda: module(x).sum().backward()


def spatialflow(images: int) -> Work:
    """Panoptic quality of images of 640x480 with 40 segments each."""
    from mm_plugins.spatialflow.quality import count_image, panoptic_quality

    generator = np.random.default_rng(0)
    blocks = generator.permutation(40).reshape(5, 8) + 1
    gt = np.kron(blocks, np.ones((96, 80), np.int64))
    ids = list(range(1, 41))
    labels = [number % 10 for number in ids]
    no_crowd = [False] * 40

    def work() -> Any:
        shifted = (np.roll(gt, 5 + i % 7, axis=1) for i in range(images))
        counts = (count_image(gt, ids, labels, no_crowd, pred, ids, labels) for pred in shifted)
        return panoptic_quality(counts, 10)

    return work


def _checkpoint(parameters: int, folder: Path) -> int:
    """A Llama of about so many weights in bfloat16, and how many there are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width = 1024
    layers = max(4, parameters // (4 * width * width + 3 * width * 4 * width))
    config = LlamaConfig(
        vocab_size=1024, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=8, dtype=torch.bfloat16,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100MB")
    return sum(parameter.numel() for parameter in model.parameters())


def gradpruner(folder: Path) -> Work:
    """Dropping two layers of a checkpoint on disk."""
    from hf_plugins.cli import main

    words = ["gradpruner", "apply", "--model", str(folder / "base"), "--method", "reverse", "--n_prune", "2"]

    def work() -> None:
        if main([*words, "--output_dir", str(folder / "short")]) != 0:
            raise RuntimeError("mmhf gradpruner apply failed")

    return work


def fapm(folder: Path) -> Work:
    """Pruning the changes of a fine-tuned checkpoint on disk."""
    from hf_plugins.fapm.config import FAPMConfig
    from hf_plugins.fapm.model import fapm_prune_checkpoint

    return lambda: fapm_prune_checkpoint(
        folder / "base", folder / "tuned", folder / "out", FAPMConfig(keep=0.1)
    )


def dp(records: int) -> Work:
    """One private step of a small transformer: records of the batch in virtual steps of 16."""
    from datasets import Dataset
    from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

    from hf_plugins.dp import DPConfig, DPTrainer

    config = BertConfig(
        vocab_size=1000, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256
    )
    ids = torch.randint(5, 1000, (2 * records, 32), generator=torch.Generator().manual_seed(0))
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 2).tolist()})
    arguments = TrainingArguments(
        tempfile.mkdtemp(), per_device_train_batch_size=16, gradient_accumulation_steps=records // 16,
        max_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = DPTrainer(
        model=BertForSequenceClassification(config),
        args=arguments,
        train_dataset=rows,
        dp=DPConfig(noise_multiplier=1.0, delta=1e-5),
    )
    return trainer.train


def dpnas(images: int) -> Work:
    """The default network on images of 32x32, without training."""
    from hf_plugins.dpnas import DPNASNetConfig, DPNASNetForImageClassification

    model = DPNASNetForImageClassification(DPNASNetConfig()).eval()

    def work() -> None:
        with torch.no_grad():
            for _ in range(images // 16):
                model(torch.zeros(16, 3, 32, 32))

    return work


def dp_fedavg(clients: int) -> Work:
    """Five rounds of 10 of so many clients, BLUR and LUS on."""
    from benchmarks.dp_fedavg import in_process

    return lambda: in_process(clients, 5, "engine")


def hpn(clients: int) -> Work:
    """Ten steps of the policy with so many clients in each."""
    from hf_plugins.hpn.agent import HPN, Trial
    from hf_plugins.hpn.config import HPNConfig
    from hf_plugins.hpn.space import Categorical, Space

    space = Space(
        {
            "learning_rate": Categorical(choices=(0.1, 0.3, 1.0)),
            "weight_decay": Categorical(choices=(0.0, 0.1)),
        }
    )
    search = HPN(space, HPNConfig(num_rounds=20))
    ids = list(range(clients))
    generator = torch.Generator().manual_seed(0)
    search.enrol({client: torch.randn(64, generator=generator) for client in ids})

    def work() -> None:
        for step in range(10):
            actions = search.ask(ids, step=step, generator=generator)
            gains = {client: float(step) for client in ids}
            search.tell(Trial(step=step, start=step, client_ids=ids, actions_KP=actions, gains=gains))

    return work


def tee_split(tokens: int) -> Work:
    """Sealing hidden states of width 4,096 in bfloat16."""
    from hf_plugins.tee_split.frames import DATA, Sealer
    from hf_plugins.tee_split.tensors import pack

    states = torch.randn(512, 4096).to(torch.bfloat16)

    def work() -> None:
        sealer = Sealer(bytes(32), direction=1, session=1)
        for _ in range(tokens // 512):
            for _ in sealer.seal(DATA, pack({}, {"x": states})):
                pass

    return work


def embed_parrot(tokens: int) -> Work:
    """Nearest of 32,000 embeddings of width 384 for so many hidden states."""
    from hf_plugins.embed_parrot.matching import best_rows, unit_rows

    table, states = unit_rows(torch.randn(32000, 384)), unit_rows(torch.randn(tokens, 384))
    return lambda: best_rows(states, table, torch.arange(32000))


def dpf_cm(documents: int) -> Work:
    """Near-duplicates among documents of 60 words."""
    from datasets import Dataset

    from hf_plugins.data_ops import OpContext, make_op

    generator = np.random.default_rng(0)
    words = np.array([f"word{number}" for number in range(5000)])
    texts = [" ".join(words[generator.integers(0, 5000, 60)]) for _ in range(documents)]
    rows = Dataset.from_dict({"text": texts})
    op = make_op({"document_minhash_deduplicator": {"tokenization": "words"}})
    return lambda: op.run(rows, OpContext())


def autodp(rows: int) -> Work:
    """A stratified tenth of so many embedded rows."""
    from hf_plugins.autodp.sampling import sample_rows

    x = np.random.default_rng(0).normal(size=(rows, 64)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return lambda: sample_rows(x, np.arange(rows) % 2, 0.1)


class Curve(NamedTuple):
    """A method's curve."""

    method: str
    what: str
    unit: str
    make: Callable[[Any], Work]
    sizes: tuple[int, ...]
    target: int
    target_name: str


DISK = (10**8, 2 * 10**8, 4 * 10**8)
CURVES = (
    Curve("PKD", "loss, a level", "positions", pkd, (2500, 10000, 40000), 22200, "an image of 800x1333"),
    Curve("LaU", "19 maps, x8", "output pixels", lau, (128**2, 256**2, 512**2), 1024 * 2048, "Cityscapes"),
    Curve("SpatialFlow", "panoptic quality", "images", spatialflow, (5, 20, 80), 5000, "COCO val"),
    Curve("GradPruner", "apply on disk", "weights", gradpruner, DISK, 8 * 10**9, "8B"),
    Curve("FAPM", "prune on disk", "weights", fapm, DISK, 8 * 10**9, "8B"),
    Curve("DP", "one private step", "records a step", dp, (64, 256, 1024), 4096, "batch 4,096"),
    Curve("DPNAS", "network, forward", "images", dpnas, (64, 256, 1024), 10000, "CIFAR-10 test"),
    Curve("DP-FedAvg", "5 rounds of 10", "clients", dp_fedavg, (10, 1000, 100000), 10**4, "10,000 clients"),
    Curve("HPN", "10 steps of the policy", "clients a step", hpn, (10, 100, 1000), 1000, "1,000 a round"),
    Curve("TEE-split", "sealing", "tokens", tee_split, (2048, 8192, 32768), 10**6, "10^6 tokens"),
    Curve("Embed Parrot", "matching, 32,000 words", "tokens", embed_parrot, (256, 1024, 4096), 10**5, "10^5"),
    Curve("DPF-CM", "near-duplicates", "documents", dpf_cm, (1000, 10000, 50000), 10**6, "10^6 documents"),
    Curve("LLM-AutoDP", "sampling a tenth", "rows", autodp, (1000, 10000, 50000), 10**5, "10^5 rows"),
)  # fmt: skip
ON_DISK = (gradpruner, fapm)


def measure(curve: Curve, size: int) -> dict[str, float]:
    """One point, in this process: CPU seconds, and MB above what was in use before."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        given: Any = size
        if curve.make in ON_DISK:
            # In a child, so that the models made here do not count.
            given = Path(name)
            maker = "import sys; from pathlib import Path; from benchmarks.scale import _checkpoint;"
            maker += (
                "print([_checkpoint(int(sys.argv[1]), Path(sys.argv[2]) / n) for n in ('base', 'tuned')][0])"
            )
            made = [sys.executable, "-W", "ignore", "-c", maker, str(size), name]
            size = int(subprocess.run(made, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])
        work = curve.make(given)
        before = resource.getrusage(resource.RUSAGE_SELF)
        began = time.process_time()
        work()
        seconds = time.process_time() - began
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {"size": size, "seconds": seconds, "mb": (after.ru_maxrss - before.ru_maxrss) / 1024}


def exponent(points: Sequence[dict[str, float]], key: str) -> float:
    """Slope of the last two points on logarithmic axes."""
    first, last = points[-2], points[-1]
    if min(first[key], last[key]) <= 0:
        return 0.0
    return math.log(last[key] / first[key]) / math.log(last["size"] / first["size"])


def human(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every curve, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="methods, by their names in the table")
    parser.add_argument("--short", action="store_true", help="the first point of each, result not kept")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.point:
        curve = next(curve for curve in CURVES if curve.method == args.point[0])
        print(json.dumps(measure(curve, int(args.point[1]))))
        return 0
    rows, details = [], {}
    for curve in CURVES:
        if args.only and curve.method not in args.only:
            continue
        points = []
        for size in curve.sizes[:1] if args.short else curve.sizes:
            command = [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "benchmarks.scale",
                "--point",
                curve.method,
                str(size),
            ]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            points.append(json.loads(done.stdout.splitlines()[-1]))
            print(curve.method, points[-1], flush=True)
        if args.short:
            continue
        details[curve.method] = points
        last = points[-1]
        at_target = (
            last["seconds"] * curve.target / last["size"] if curve.method != "DP-FedAvg" else last["seconds"]
        )
        rows.append(
            [
                curve.method,
                curve.what,
                ", ".join(f"{point['size']:,.0f}" for point in points) + f" {curve.unit}",
                ", ".join(f"{point['seconds']:.3g}" for point in points),
                f"{exponent(points, 'seconds'):.2f}",
                ", ".join(f"{point['mb']:.0f}" for point in points),
                f"{curve.target_name}: {human(at_target)}",
            ]
        )
    if args.short or args.only:
        return 0
    write_result(
        "scale",
        command="python -m benchmarks.scale",
        config={curve.method: {"sizes": list(curve.sizes), "target": curve.target} for curve in CURVES},
        seeds=[0],
        packages=("transformers", "numpy"),
        columns=[
            "method", "what", "sizes", "CPU seconds", "exponent", "MB above the start", "at the users' size"
        ],
        rows=rows,
        notes=[
            "One CPU thread, one process a point; the exponent is that of the last two points. Memory is "
            "what the work added to the peak of the process (inputs made before it do not count); for "
            "checkpoints on disk mapped pages count.",
            "The last column is arithmetic: the largest point times the ratio of sizes.",
        ],
        details=details,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
