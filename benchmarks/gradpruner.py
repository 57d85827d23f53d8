"""What GradPruner costs: scoring beside a training step, memory for an 8B model, shortening a checkpoint on
disk.

``python -m benchmarks.gradpruner`` times a LoRA step of a Llama-like stack, the Gram scores and the dense
product that they replace, in turns; merges one module of Llama-3.1-8B's largest shape in a fresh process and
compares its peak memory with the account; and shortens two generated checkpoints as streams. Writes
``docs/results/gradpruner_cost.json``.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.record import RESULTS, spread, write_result
from hf_plugins.gradpruner.callback import find_lora_modules
from hf_plugins.gradpruner.importance import simulated_gradient, squared_norm
from hf_plugins.gradpruner.merging import BLOCK_ENTRIES, Donor, merge_module
from hf_plugins.gradpruner.plan import PruningPlan
from hf_plugins.gradpruner.storage import GradientHistory, prune_checkpoint

ROOT = Path(__file__).resolve().parent.parent
# Llama-3.1-8B: (out, in) of the seven linear modules of a layer.
LLAMA_8B = [
    (4096, 4096),
    (1024, 4096),
    (1024, 4096),
    (4096, 4096),
    (14336, 4096),
    (14336, 4096),
    (4096, 14336),
]
LAYERS_8B, RANK, STEPS, DONORS = 32, 8, 40, 3


def timed(action: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def scoring(*, hidden: int, layers: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of a LoRA step, of Gram scores (without and with history) and of the dense product, in
    turns."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
    )
    torch.manual_seed(0)
    model = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear")
    )
    modules, _ = find_lora_modules(model)
    for module in modules.values():
        module.lora_B["default"].weight.data.normal_(0, 0.01)
    ids = torch.randint(0, 2048, (tokens // 256, 256))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    history = GradientHistory()
    dense = {key: torch.zeros(module.get_base_layer().weight.shape) for key, module in modules.items()}

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def factors() -> dict:
        found = {}
        for key, module in modules.items():
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            found[key] = simulated_gradient(a, b, a.grad, b.grad)
        return found

    def gram() -> list[float]:
        return torch.stack([squared_norm(*pair) for pair in factors().values()]).tolist()

    def gram_and_history() -> None:
        pairs = factors()
        torch.stack([squared_norm(*pair) for pair in pairs.values()]).tolist()
        history.add(pairs)
        history.truncate(0)

    def dense_product() -> list[float]:
        found = []
        for key, (left, right) in factors().items():
            product = (left @ right).square()
            dense[key] += product
            found.append(float(product.sum()))
        return found

    actions = {"step": step, "gram": gram, "gram and history": gram_and_history, "dense": dense_product}
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds + 1):
        for name, action in actions.items():
            seconds = timed(action)
            if turn:
                times[name].append(seconds)
    error = max(abs(x - y) / y for x, y in zip(gram(), dense_product(), strict=True))
    return {
        "seconds": times,
        "relative_error": error,
        "modules": len(modules),
        "dense_bytes": sum(x.nbytes for x in dense.values()),
    }


def account() -> dict[str, int]:
    """Bytes for an 8B model in bf16, 40 steps, rank 8, three donors: what each part holds at its peak."""
    m, n = 14336, 4096
    factors = STEPS * RANK * (m + n) * 4
    # One row block: old rows, donors, F (fp32), masks, result, summands, bits, ranks of ties (int64).
    block = BLOCK_ENTRIES * (2 + DONORS * (2 + 4 + 1) + 4 + 4 + 4 + 8)
    return {
        "grams of one module": 2 * RANK * RANK * 4 + 2 * RANK * RANK * 8,
        "norms of all steps": STEPS * len(LLAMA_8B) * LAYERS_8B * 8,
        "factors of one step, all modules": sum(RANK * (a + b) * 4 for a, b in LLAMA_8B) * LAYERS_8B,
        "history of 40 steps": STEPS * sum(RANK * (a + b) * 4 for a, b in LLAMA_8B) * LAYERS_8B,
        "merge: receiver": m * n * 2,
        "merge: factors of 3 donors": DONORS * factors,
        "merge: row blocks": block,
        "merge, all": m * n * 2 + DONORS * factors + block,
        "dense F of all modules, fp32 (authors' way)": sum(a * b for a, b in LLAMA_8B) * LAYERS_8B * 4,
    }


def flops() -> tuple[int, int]:
    """Multiply-adds times two of one step's scores for 8B: Gram matrices, dense products."""
    gram = sum(2 * RANK * RANK * (m + n) for m, n in LLAMA_8B) * LAYERS_8B
    return gram, sum(2 * RANK * m * n for m, n in LLAMA_8B) * LAYERS_8B


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def child_merge(shape: tuple[int, int], steps: int) -> dict[str, float]:
    """Merge three donors into one module; runs in its own process."""
    torch.set_num_threads(1)
    m, n = shape

    class FileLike:
        """Rows made when asked, as a file gives them."""

        def __getitem__(self, rows: slice) -> torch.Tensor:
            return torch.randn(rows.stop - rows.start, n).bfloat16()

    merge_module(
        torch.randn(64, 64), [Donor(torch.randn(64, 64), torch.randn(1, 64, 2), torch.randn(1, 2, 64))]
    )
    before = peak_bytes()
    receiver = torch.empty(m, n, dtype=torch.bfloat16)
    for start in range(0, m, 256):
        receiver[start : start + 256] = FileLike()[start : min(m, start + 256)]
    donors = [
        Donor(FileLike(), torch.randn(steps, m, RANK), torch.randn(steps, RANK, n)) for _ in range(DONORS)
    ]
    seconds = timed(lambda: merge_module(receiver, donors))
    return {"extra_bytes": peak_bytes() - before, "seconds": seconds}


def child_apply(source: str, out: str, merge: bool) -> dict[str, float]:
    """Shorten a checkpoint; runs in its own process."""
    torch.set_num_threads(1)
    layers = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    dropped = tuple(range(layers - 2, layers - 2 - layers // 3, -1))[::-1]
    history, merged = None, ()
    if merge:
        history, merged = GradientHistory(), ((dropped[0], dropped[0] - 1),)
        config = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
        shape = (config["intermediate_size"], config["hidden_size"])
        for _ in range(2):
            pair = torch.randn(shape[0], RANK), torch.randn(RANK, shape[1])
            history.add({(layer, "mlp.up_proj"): pair for layer in (dropped[0], dropped[0] - 1)})
    plan = PruningPlan(num_layers=layers, dropped=dropped, merged=merged)
    before = peak_bytes()
    seconds = timed(lambda: prune_checkpoint(source, out, plan, history=history))
    return {"extra_bytes": peak_bytes() - before, "all_bytes": peak_bytes(), "seconds": seconds}


def in_process(kind: str, *arguments: object) -> dict[str, float]:
    """Run a measurement in a fresh process, so that peaks do not mix."""
    command = [sys.executable, "-m", "benchmarks.gradpruner", "--child", kind, json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def write_checkpoint(folder: Path, *, hidden: int, layers: int) -> int:
    """A sharded bf16 checkpoint of random weights, one layer a shard; returns its bytes."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).state_dict().items()}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        part = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{part}.safetensors", []).append(name)
    for file, names in shards.items():
        save_file({name: torch.randn(shapes[name]).bfloat16() for name in names}, folder / file)
    index = {"weight_map": {name: file for file, names in shards.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def applying(*, hidden: int, sizes: Sequence[int]) -> dict[str, Any]:
    """Peak memory and time of shortening, against copying the same kept bytes."""
    found = {}
    for layers in sizes:
        with tempfile.TemporaryDirectory(prefix="gradpruner-") as temporary:
            source = Path(temporary) / "long"
            source.mkdir()
            size = write_checkpoint(source, hidden=hidden, layers=layers)
            # Once, so that both sides read from the page cache.
            shutil.copytree(source, Path(temporary) / "warm")
            shutil.rmtree(Path(temporary) / "warm")
            plain = in_process("apply", str(source), str(Path(temporary) / "short"), False)
            kept = sum(path.stat().st_size for path in (Path(temporary) / "short").glob("*.safetensors"))
            copy = timed(
                lambda: subprocess.run(
                    ["cp", "-r", str(Path(temporary) / "short"), str(Path(temporary) / "copy")], check=True
                )
            )  # noqa: B023
            merging = in_process("apply", str(source), str(Path(temporary) / "merged"), True)
        found[str(layers)] = {
            "bytes": size,
            "kept_bytes": kept,
            "plain": plain,
            "merging": merging,
            "cp_seconds": copy,
        }
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the result file, print one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=1024, help="width of the timed stack")
    parser.add_argument("--layers", type=int, default=4, help="its layers")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens a step")
    parser.add_argument("--rounds", type=int, default=5, help="counted turns")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--short", action="store_true", help="small sizes, result not kept")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        kind, values = args.child[0], json.loads(args.child[1])
        print(json.dumps({"merge": child_merge, "apply": child_apply}[kind](*values)))
        return 0
    shape, merge_steps, hidden, sizes = (14336, 4096), 8, 2048, (6, 12)
    if args.short:
        args.hidden, args.layers, args.tokens, args.rounds = 256, 2, 256, 2
        args.out = Path(tempfile.mkdtemp(prefix="benchmark-"))
        shape, merge_steps, hidden, sizes = (512, 256), 2, 128, (6,)
    torch.set_num_threads(1)
    timing = scoring(hidden=args.hidden, layers=args.layers, tokens=args.tokens, rounds=args.rounds)
    merge = in_process("merge", shape, merge_steps)
    expected = account()["merge, all"] - DONORS * (STEPS - merge_steps) * RANK * (14336 + 4096) * 4
    apply = applying(hidden=hidden, sizes=sizes)
    path = write_result(
        "gradpruner_cost",
        command="python -m benchmarks.gradpruner",
        config={
            "hidden": args.hidden,
            "layers": args.layers,
            "tokens": args.tokens,
            "rank": RANK,
            "threads": 1,
        },
        seeds=[0],
        packages=("transformers", "peft", "safetensors"),
        columns=["what", "measured", "target or rival"],
        rows=table(timing, merge, merge_steps, expected, apply),
        notes=[
            f"Step: LoRA rank 8 on all linear modules of {args.layers} Llama layers of width {args.hidden}, "
            f"{args.tokens} tokens, fp32, one thread; shares are medians over {args.rounds} turns (range).",
            "Account for Llama-3.1-8B in bf16, rank 8, 40 steps, 3 donors, its largest module 14336 x "
            "4096, in bytes: " + "; ".join(f"{name} {value:,}" for name, value in account().items()) + ".",
        ],
        details={"scoring": timing, "merge": merge, "apply": apply, "account": account(), "flops": flops()},
        folder=args.out,
    )
    print(json.dumps({"benchmark": "gradpruner_cost", "result": path.name}))
    return 0


def table(
    timing: dict[str, Any], merge: dict[str, float], merge_steps: int, expected: int, apply: dict[str, Any]
) -> list[list[str]]:
    """Rows of the result."""
    times = timing["seconds"]

    def share(name: str) -> str:
        return spread([100 * x / y for x, y in zip(times[name], times["step"], strict=True)]) + " %"

    gram, dense = flops()
    parts = account()
    scoring_bytes = parts["factors of one step, all modules"] + parts["norms of all steps"]
    dense_bytes = parts["dense F of all modules, fp32 (authors' way)"]
    faster = [x / y for x, y in zip(times["dense"], times["gram"], strict=True)]
    rows = [
        ["Gram scores, share of a step", share("gram"), f"<= 3 %; dense products: {share('dense')}"],
        ["Gram scores and history in memory, share of a step", share("gram and history"), "<= 3 %"],
        [
            "Gram against dense products, times faster",
            spread(faster),
            f"FLOPs at 8B: {gram / 1e9:.2f} G against {dense / 1e9:.0f} G ({dense / gram:.0f}x)",
        ],
        ["largest relative difference of the two", f"{timing['relative_error']:.1e}", "1e-4 in fp32"],
        [
            "scoring, 8B: memory beside the step (account)",
            f"{scoring_bytes / 1e6:.0f} MB",
            f"dense F: {dense_bytes / 1e9:.0f} GB",
        ],
        [
            "merging, 8B's largest module, 3 donors, 40 steps (account)",
            f"{parts['merge, all'] / 1e6:.0f} MB",
            "< 300 MB",
        ],
        [
            f"the same with {merge_steps} steps, peak of a fresh process",
            f"{merge['extra_bytes'] / 1e6:.0f} MB in {merge['seconds']:.0f} s",
            f"account: {expected / 1e6:.0f} MB",
        ],
    ]
    for layers, case in apply.items():
        for kind in ("plain", "merging"):
            run = case[kind]
            rows.append(
                [
                    f"shorten {case['bytes'] / 1e9:.2f} GB ({layers} layers) to "
                    f"{case['kept_bytes'] / 1e9:.2f} GB, "
                    + ("drop only" if kind == "plain" else "one module merged"),
                    f"+{run['extra_bytes'] / 1e6:.0f} MB over the imports, {run['seconds']:.1f} s",
                    f"cp of the result: {case['cp_seconds']:.1f} s",
                ]
            )
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
