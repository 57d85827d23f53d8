"""FAPM over generated sharded checkpoints: peak memory and time against ``cp`` of the same bytes, against
mergekit's DARE and TIES merges of the same pair, and against the authors' five lines on a size they can hold.

``python -m benchmarks.fapm --folder FOLDER`` writes about 10 GB below FOLDER and deletes them;
``--mergekit-python PATH`` names the Python of an environment with mergekit. ``--short`` uses some megabytes.
Prints one JSON line and writes ``docs/results/fapm.json``.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.record import RESULTS, write_result
from hf_plugins.fapm.storage import Planned, ShardWriter

ROOT = Path(__file__).resolve().parent.parent
# (vocabulary, width, inner width, layers) of Llama-like models in bf16; the large one is 3.2 GB, and one of
# its tensors has 263 million entries.
SIZES = {
    "tiny": (8_000, 1024, 2816, 4),
    "small": (32_000, 2048, 5632, 4),
    "large": (128_256, 2048, 5632, 21),
}
# accelerate's launcher of several processes is called multi_gpu, also where they compute on the CPU.
LAUNCH = (
    *("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
)
SHORT = {"tiny": (500, 64, 128, 1), "large": (2000, 256, 512, 2)}


def tensors(size: tuple[int, int, int, int]) -> list[Planned]:
    """Names and shapes of a Llama."""
    vocabulary, width, inner, layers = size
    found = [Planned("model.embed_tokens.weight", "BF16", (vocabulary, width))]
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
        shapes |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width)}
        shapes["mlp.down_proj"] = (width, inner)
        found += [Planned(f"{prefix}{name}.weight", "BF16", shape) for name, shape in shapes.items()]
        norms = ("input_layernorm", "post_attention_layernorm")
        found += [Planned(f"{prefix}{name}.weight", "BF16", (width,)) for name in norms]
    found.append(Planned("model.norm.weight", "BF16", (width,)))
    return [*found, Planned("lm_head.weight", "BF16", (vocabulary, width))]


def generate(
    folder: Path, size: tuple[int, int, int, int], *, shard_bytes: int = 10**9
) -> tuple[Path, Path, int]:
    """A base with Gaussian weights and a fine-tuned one, written in pieces; gives both and the bytes of
    each."""
    vocabulary, width, inner, layers = size
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    shards: list[list[Planned]] = [[]]
    used = 0
    for item in tensors(size):
        count = 2 * torch.Size(item.shape).numel()
        if used and used + count > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(item)
        used += count
    writers = []
    for name in ("base", "finetuned"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        writer = ShardWriter(folder / name)
        for index, items in enumerate(shards):
            part = "" if len(shards) == 1 else f"-{index + 1:05d}-of-{len(shards):05d}"
            writer.plan(f"model{part}.safetensors", items)
        writer.create()
        writers.append(writer)
    generator = torch.Generator().manual_seed(0)
    for item in tensors(size):
        numel = torch.Size(item.shape).numel()
        for start in range(0, numel, 1 << 22):
            length = min(1 << 22, numel - start)
            w = torch.randn(length, generator=generator).mul_(0.02).bfloat16()
            # A hundredth of the weights' deviation, as a task vector of a few epochs has; rounded to bf16.
            ft = w.float().add_(torch.randn(length, generator=generator), alpha=2e-4).bfloat16()
            writers[0].write(item.name, start, w)
            writers[1].write(item.name, start, ft)
    for writer in writers:
        writer.close(sync=True)
        writer.write_index()
    return folder / "base", folder / "finetuned", writers[0].size


# Runs a command and tells its wall time and the peak of its largest process. Without torch: a child starts as
# a copy of its parent, whose own memory would be the least that can be seen.
WATCH = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
seconds = time.perf_counter() - start
if done.returncode:
    sys.exit(done.stderr.decode(errors="replace")[-3000:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e6]))
"""


def measured(command: Sequence[str]) -> tuple[float, float, float]:
    """Wall and CPU seconds of a command, and the peak resident MB of its largest process, mapped pages in."""
    done = subprocess.run(
        [sys.executable, "-c", WATCH, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    seconds, cpu, peak = json.loads(done.stdout)
    return seconds, cpu, peak


def literal(base: Path, tuned: Path, out: Path) -> None:
    """The authors' five lines over two whole state dicts, as their script runs them, on the CPU."""
    from safetensors.torch import load_file, save_file

    before, after = (
        {name: w for path in sorted(folder.glob("*.safetensors")) for name, w in load_file(path).items()}
        for folder in (base, tuned)
    )
    for name, w in before.items():
        delta = after[name] - w
        score = delta.abs() - w.abs().mean() * (delta.abs() / w.abs())
        chosen = torch.argsort(score.flatten(), descending=True)[: int(score.numel() * 0.1)]
        mask = torch.zeros(score.numel(), dtype=w.dtype)
        mask[chosen] = 1
        after[name] = w + mask.view_as(w) * delta
    out.mkdir()
    save_file(after, out / "model.safetensors")


def copy_command(base: Path, tuned: Path, out: Path) -> list[str]:
    """Read both, write one, wait for the disk: the same bytes as a pruning moves."""
    script = f"cp -r '{base}' '{out}' && cat '{tuned}'/*.safetensors > /dev/null && sync '{out}'/*"
    return ["bash", "-c", script]


def mergekit_command(python: str, method: str, base: Path, tuned: Path, out: Path) -> list[str]:
    """mergekit-yaml with one fine-tuned model at density 0.1."""
    config = out.with_suffix(".yaml")
    model = {"model": str(tuned), "parameters": {"weight": 1.0, "density": 0.1}}
    recipe = {"merge_method": method, "base_model": str(base), "models": [model], "dtype": "bfloat16"}
    # JSON is YAML.
    config.write_text(json.dumps(recipe))
    return [python, "-m", "mergekit.scripts.run_yaml", str(config), str(out), "--no-copy-tokenizer"]


def repeated(commands: dict[str, list[str]], out: Path, rounds: dict[str, int]) -> dict[str, dict]:
    """Run each command some times, in turns, deleting the output before and after each."""
    found: dict[str, dict] = {name: {"seconds": [], "cpu": [], "rss_mb": []} for name in commands}
    for turn in range(max(rounds.values())):
        for name, command in commands.items():
            if turn >= rounds[name]:
                continue
            shutil.rmtree(out, ignore_errors=True)
            seconds, cpu, rss = measured(command)
            found[name]["seconds"].append(seconds)
            found[name]["cpu"].append(cpu)
            found[name]["rss_mb"].append(rss)
            print(f"{name}: {seconds:.1f} s, {cpu:.1f} s CPU, {rss:.0f} MB", file=sys.stderr)
            if (out / "fapm.json").is_file():
                report = json.loads((out / "fapm.json").read_text(encoding="utf-8"))
                found[name].setdefault("work_seconds", []).append(report["seconds"])
            shutil.rmtree(out, ignore_errors=True)
    return found


def report(
    found: dict[str, dict], sizes_mb: dict[str, float], *, sizes: dict, args: argparse.Namespace
) -> Path:
    """The result file from the raw figures."""
    rows = []
    for label, each in found.items():
        copy = statistics.median(each["cp"]["seconds"])
        copy_cpu = statistics.median(each["cp"]["cpu"])
        for name, figures in each.items():
            seconds = statistics.median(figures["seconds"])
            work_seconds = statistics.median(figures.get("work_seconds", [seconds]))
            rows.append(
                [
                    f"{sizes_mb[label] / 1e3:.2f} GB",
                    name,
                    f"{seconds:.1f} ({min(figures['seconds']):.1f}-{max(figures['seconds']):.1f})",
                    f"{work_seconds:.1f}" if "work_seconds" in figures else "-",
                    f"{seconds / copy:.1f}",
                    f"{statistics.median(figures['cpu']):.1f}",
                    f"{statistics.median(figures['cpu']) / copy_cpu:.1f}",
                    f"{max(figures['rss_mb']):.0f}",
                ]
            )
    mergekit = " --mergekit-python PYTHON" if args.mergekit_python else ""
    return write_result(
        args.name,
        command=f"python -m benchmarks.fapm --folder FOLDER --sizes {' '.join(sizes)} --rounds {args.rounds} "
        f"--name {args.name}{mergekit}",
        config={"sizes": sizes, "rounds": args.rounds, "keep": 0.1, "threads": 1},
        seeds=[0],
        packages=("accelerate",),
        columns=[
            "each checkpoint",
            "what",
            "seconds, median (range)",
            "of it work",
            "times cp",
            "CPU seconds",
            "times cp (CPU)",
            "peak RSS, MB",
        ],
        rows=rows,
        notes=[
            "cp: copy of the base, reading of the fine-tuned model, sync: what a pruning reads and writes.",
            "Work is the time without starting Python and torch. The peak is that of the largest process, "
            "mapped pages included.",
        ],
        details=found,
        folder=args.out,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the result file, print one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made; needs 12 GB free")
    parser.add_argument("--mergekit-python", help="Python of an environment that has mergekit")
    parser.add_argument("--ties-all", action="store_true", help="TIES on all pairs, not only the tiny one")
    parser.add_argument("--rounds", type=int, default=2, help="turns of ours and of cp")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="which pairs")
    parser.add_argument("--name", default="fapm", help="name of the result file")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--short", action="store_true", help="megabytes, one round, result not kept")
    parser.add_argument("--literal", nargs=3, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.literal:
        literal(*args.literal)
        return 0
    sizes = SHORT if args.short else {label: SIZES[label] for label in args.sizes}
    if args.short:
        args.rounds, args.out = 1, Path(tempfile.mkdtemp(prefix="benchmark-"))
    elif args.folder is None:
        parser.error("--folder is needed: the checkpoints take 12 GB")
    work = Path(tempfile.mkdtemp(prefix="fapm-", dir=args.folder))
    free = shutil.disk_usage(work).free
    if not args.short and free < 12e9:
        work.rmdir()
        parser.error(f"{args.folder} has {free / 1e9:.0f} GB free, 12 are needed")
    found, sizes_mb = {}, {}
    try:
        for label, size in sizes.items():
            folder = work / label
            base, tuned, count = generate(folder, size)
            sizes_mb[label] = count / 1e6
            out = folder / "out"
            pair = [str(base), str(tuned), str(out)]
            one = [sys.executable, "-m", "hf_plugins.fapm", *pair]
            launch = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH, *one[1:]]
            commands = {"cp": copy_command(base, tuned, out), "FAPM": one}
            if label == "large" or args.short:
                commands["FAPM, 2 processes"] = launch
            rounds = dict.fromkeys(commands, args.rounds)
            if label == "tiny":
                commands["five lines"] = [sys.executable, "-m", "benchmarks.fapm", "--literal", *pair]
            if args.mergekit_python:
                methods = {"mergekit DARE": "dare_linear", "mergekit TIES": "ties"}
                if label != "tiny" and not args.ties_all:
                    del methods["mergekit TIES"]
                for name, method in methods.items():
                    commands[name] = mergekit_command(args.mergekit_python, method, base, tuned, out)
            found[label] = repeated(commands, out, {name: rounds.get(name, 1) for name in commands})
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    path = report(found, sizes_mb, sizes=sizes, args=args)
    print(json.dumps({"benchmark": args.name, "result": path.name, "megabytes": sizes_mb}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
