"""What the savings of LLM-AutoDP save: the time of one search with nothing, sampling (DPS), target selection
(PTS), the cache, and all of them, split into operators, training, answers and judging, beside the least the
cost model allows; with ``--sampling`` what each sampler keeps and how much memory it takes at 10^5 rows.

``python -m benchmarks.autodp`` prints one JSON line and writes ``docs/results/autodp.json``; ``--short`` runs
tiny sizes and writes nothing. CPU seconds, so that a busy machine does not count.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import write_result
from hf_plugins.autodp.sampling import METHODS, kernel_width, mmd, sample_rows, total_variation
from hf_plugins.autodp.strategies import Space, cost_model, team_runs

SETTINGS = ("nothing", "dps", "pts", "cache", "all")
RATIO = 0.2
NAMES = {
    "nothing": "nothing",
    "dps": f"DPS ({RATIO:.0%} of the rows)",
    "pts": "PTS",
    "cache": "cache",
    "all": "all three",
}
SAMPLE = """
import json, sys, time, tracemalloc
import numpy as np
from hf_plugins.autodp.sampling import sample_rows
n, d, method = int(sys.argv[1]), 64, sys.argv[2]
x = np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)
x /= np.linalg.norm(x, axis=1, keepdims=True)
tracemalloc.start()
start = time.process_time()
if method == "matrix":
    gain = (x @ x.T).sum(1)
    chosen = np.argsort(-gain)[: n // 5]
else:
    chosen = sample_rows(x, np.zeros(n), 0.2, method=method)
peak = tracemalloc.get_traced_memory()[1]
print(json.dumps([time.process_time() - start, peak / 2**20, len(chosen)]))
"""


def judge(messages: list[dict[str, str]]) -> str:
    """Prefers the response that shares more words with the question: cheap, and different for each answer."""
    text = messages[0]["content"]
    asked = set(text.split("Question: ")[1].split("\n\nResponse 1: ")[0].lower().split())
    first = text.split("Response 1: ")[1].split("\n\nResponse 2: ")[0].lower().split()
    second = text.split("Response 2: ")[1].split("\n\nIs response 1")[0].lower().split()
    a, b = (len(asked & set(words)) for words in (first, second))
    return "win" if a > b else "lose" if a < b else "tie"


def one_search(setting: str, work: Path, *, short: bool) -> dict[str, Any]:
    """The same strategies with one saving switched on; the length of training follows the number of rows, as
    three epochs do.
    """
    # Not at the head: the samplers' table needs no host.
    import datasets
    from transformers.utils import logging as transformers_logging

    from benchmarks.autodp_search import prepare, table, writer
    from hf_plugins.autodp.config import AutoDPConfig
    from hf_plugins.autodp.strategy import AutoDP
    from hf_plugins.data_ops.chat import ScriptedChat

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    parts, model = prepare("en", 0, work, short=short)
    everything = setting == "all"
    ratio = RATIO if everything or setting == "dps" else 1.0
    rows = table(parts["rows"])
    dirty = [kind == "degraded" or kind == "garbled" for _, _, kind in parts["rows"]]
    rows = rows.add_column("planted", dirty)
    count = len(rows)
    script = writer(parts["train"], parts["reserve"])
    clients = {"default": script, "judge": ScriptedChat(judge, identity="words-1")}
    options = AutoDPConfig(
        metric="winrate",
        clients={"judge": {}},
        search="random",
        num_strategies=2 if short else 6,
        sample_ratio=ratio,
        screening="column" if everything or setting == "pts" else "off",
        screening_column="planted",
        early_stopping=False,
        num_dev=len(parts["dev"]),
        num_test=len(parts["test"]),
        num_anchors=len(parts["anchors"]),
        num_steps=max(2, round(3 * count * ratio / 16)),
        learning_rate=2e-3,
        batch_size=16,
        device_batch_size=16,
        max_length=128,
        max_new_tokens=8,
        lora_r=0,
        num_synthetic=round(100 * ratio),
        less_checkpoints=1,
        less_warmup=0.2,
        projection_dim=512,
        isolate=False,
        use_cpu=True,
        reuse=everything or setting == "cache",
        seed=3,
    )
    tuner = AutoDP(model, options, clients=clients)
    held = {part: table(parts[part]) for part in ("dev", "test", "anchors")}
    with tempfile.TemporaryDirectory() as folder:
        # What the first training loads and compiles is no part of any saving.
        tuner_warm = AutoDP(model, replace(options, num_strategies=1, num_steps=1), clients=clients)
        tuner_warm.search(rows, Path(folder) / "warm", **held)
        asked = len(script.requests)
        # All parts of a search read this clock.
        time.perf_counter = time.process_time
        result = tuner.search(rows, Path(folder) / "run", **held, show=lambda line: print(line, flush=True))
    seconds = result["seconds"]
    optimize = sum(
        step["seconds"]
        for trial in result["trials"]
        for step in trial["ledger"]
        if step["step"] == "optimize"
    )
    return {
        "setting": setting,
        "rows": result["rows"]["sample"],
        "seconds": seconds,
        "optimize": optimize,
        "calls": len(script.requests) - asked,
        "team_runs": result["counts"]["team_runs"],
        "cache_hits": result["counts"]["cache_hits"],
        "trainings": result["counts"]["trainings"],
        "strategies": [trial["strategy"] for trial in result["trials"]],
        "dirty_share": sum(dirty) / count,
    }


def sampling_memory(n: int, method: str) -> list[float]:
    """CPU seconds, peak MiB above the embeddings, rows chosen; in a process of its own."""
    command = [sys.executable, "-c", SAMPLE, str(n), method]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def fixture_shares() -> dict[str, tuple[float, float]]:
    """Total variation of cluster shares and MMD of a fifth of 5,000 points in ten unequal clusters."""
    generator = np.random.default_rng(0)
    labels = generator.choice(10, 5000, p=generator.dirichlet(np.ones(10)))
    x = generator.normal(size=(10, 64))[labels] + 0.5 * generator.normal(size=(5000, 64))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    width = kernel_width(x, generator)
    found = {}
    for method in METHODS:
        rows = sample_rows(x, np.zeros(5000), 0.2, method=method)
        found[method] = (total_variation(labels[rows], labels), mmd(x[rows], x, width=width))
    return found


def sampling_table(sizes: Sequence[int]) -> None:
    """Write ``docs/results/autodp_sampling.json``: what each way to sample keeps, and what it costs."""
    shares = fixture_shares()
    cost = {n: sampling_memory(n, "stratified") for n in sizes}
    matrix = sampling_memory(sizes[0], "matrix")
    told = {
        "centrality": "centrality (the release)",
        "graph_cut": "graph cut (in the release, commented out)",
    }
    write_result(
        "autodp_sampling",
        command="python -m benchmarks.autodp --sampling",
        config={"points": 5000, "clusters": 10, "width": 64, "ratio": 0.2},
        seeds=[0],
        packages=("numpy",),
        columns=["sampler", "total variation of cluster shares", "MMD"],
        rows=[[told.get(name, name), f"{tv:.3f}", f"{gap:.3f}"] for name, (tv, gap) in shares.items()],
        notes=[
            *(
                f"`stratified` on {n:,} rows of width 64: {mib:.0f} MiB beside the embeddings, {cpu:.1f} CPU "
                f"s; the matrix of all pairs would hold {4 * n * n / 2**20:,.0f} MiB."
                for n, (cpu, mib, _) in cost.items()
            ),
            f"Measured with the matrix at {sizes[0]:,} rows: {matrix[1]:.0f} MiB.",
        ],
        details={"shares": shares, "cost": {str(n): found for n, found in cost.items()}, "matrix": matrix},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="tiny sizes; writes nothing to docs")
    parser.add_argument("--work", type=Path, default=Path("work_dirs/autodp"))
    parser.add_argument("--sampling", action="store_true", help="only the samplers: shares and memory")
    parser.add_argument("--setting", choices=SETTINGS, help="run one setting in this process (used inside)")
    args = parser.parse_args(argv)
    work = args.work / "short" if args.short else args.work
    work.mkdir(parents=True, exist_ok=True)
    if args.sampling:
        sampling_table((1000, 2000) if args.short else (10_000, 100_000))
        return 0
    if args.setting:
        found = one_search(args.setting, work, short=args.short)
        (work / f"{args.setting}.json").write_text(json.dumps(found), encoding="utf-8")
        return 0
    for setting in SETTINGS:
        if args.short or not (work / f"{setting}.json").is_file():
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.autodp", "--setting", setting]
            command += ["--work", str(args.work), *(["--short"] if args.short else [])]
            subprocess.run(command, check=True, stdout=None if not args.short else subprocess.DEVNULL)
    measured = {setting: json.loads((work / f"{setting}.json").read_text()) for setting in SETTINGS}
    plain = measured["nothing"]
    strategies = [Space().strategy(key.split(">")) for key in plain["strategies"]]
    alone, shared = team_runs(strategies)
    ops = {name: plain["seconds"][name] for name in ("ops", "train", "gen", "judge", "agent")}
    floor = cost_model(
        ops,
        ratio=RATIO,
        dirty_share=plain["dirty_share"],
        optimize_share=plain["optimize"] / max(ops["ops"], 1e-9),
        reuse=alone / shared,
    )
    spent = {
        setting: sum(m["seconds"][name] for name in ("ops", "train", "gen", "judge"))
        for setting, m in measured.items()
    }
    summary = {
        "speed_up": {setting: spent["nothing"] / spent[setting] for setting in SETTINGS},
        "model": {setting: floor["nothing"] / floor[setting] for setting in SETTINGS},
    }
    print(json.dumps(summary))
    if args.short:
        return 0
    rows = []
    for setting in SETTINGS:
        m = measured[setting]
        parts = [f"{m['seconds'][name]:.1f}" for name in ("ops", "train", "gen", "judge")]
        rows.append(
            [
                NAMES[setting],
                m["rows"],
                *parts,
                f"{spent[setting]:.1f}",
                f"{spent['nothing'] / spent[setting]:.2f}",
                f"{floor['nothing'] / floor[setting]:.2f}",
                m["calls"],
                m["team_runs"],
            ]
        )
    write_result(
        "autodp",
        command="python -m benchmarks.autodp",
        config={"strategies": plain["strategies"], "ratio": RATIO, "dirty_share": plain["dirty_share"]},
        seeds=[3],
        packages=("transformers", "trl", "datasets"),
        columns=[
            *("saving", "rows", "operators", "training", "answers", "judging", "sum, CPU s", "faster"),
            *("cost model", "calls", "steps run"),
        ],
        rows=rows,
        notes=[
            f"{len(strategies)} random strategies and the raw data on MedQuAD rows with planted defects, "
            "three epochs each, a tiny model; the language model is a script that costs next to nothing, so "
            "its calls are counted instead. Cost model: how much faster at best, from the split of the first "
            "line.",
            f"The floor that no saving touches, answers and judging, is "
            f"{floor['floor'] / floor['nothing']:.0%} of the "
            "time here; with a 14B judge and 400 questions it is most of it.",
            f"Prefix reuse runs {shared} steps in place of {alone}.",
        ],
        details={"measured": measured, "cost_model": floor, "summary": summary},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
