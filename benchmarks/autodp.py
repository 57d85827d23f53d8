"""What the savings of LLM-AutoDP save: the time of one search with nothing, sampling (DPS), target selection
(PTS), the cache, and all of them, split into operators, training, answers and judging, beside the least the
cost model allows; and the memory of the sample at 10^5 rows against the n x n form of the release.

``python -m benchmarks.autodp`` prints one JSON line and writes ``docs/results/autodp.json``; ``--short`` runs
tiny sizes and writes nothing. CPU seconds, so that a busy machine does not count.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
from transformers.utils import logging as transformers_logging

from benchmarks.autodp_search import prepare, table, writer
from benchmarks.record import write_result
from hf_plugins.autodp.config import AutoDPConfig
from hf_plugins.autodp.strategies import Space, cost_model, team_runs
from hf_plugins.autodp.strategy import AutoDP
from hf_plugins.data_ops.chat import ScriptedChat

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
import json, resource, sys, time
from hf_plugins.autodp.sampling import sample_rows
n, d, method = int(sys.argv[1]), 64, sys.argv[2]
x = np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)
x /= np.linalg.norm(x, axis=1, keepdims=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.process_time()
if method == "matrix":
    gain = (x @ x.T).sum(1)
    chosen = np.argsort(-gain)[: n // 5]
else:
    chosen = sample_rows(x, np.zeros(n), 0.2, method=method)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([time.process_time() - start, (peak - before) / 1024, len(chosen)]))
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="tiny sizes; writes nothing to docs")
    parser.add_argument("--work", type=Path, default=Path("work_dirs/autodp"))
    parser.add_argument("--setting", choices=SETTINGS, help="run one setting in this process (used inside)")
    args = parser.parse_args(argv)
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    work = args.work / "short" if args.short else args.work
    work.mkdir(parents=True, exist_ok=True)
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
    sizes = (2000,) if args.short else (10_000, 100_000)
    memory = {str(n): {"stratified": sampling_memory(n, "stratified")} for n in sizes}
    memory[str(sizes[0])]["matrix"] = sampling_memory(sizes[0], "matrix")
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
        "memory_mib": {n: {k: v[1] for k, v in found.items()} for n, found in memory.items()},
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
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
            f"three epochs "
            "each, a tiny model; the language model is a script that costs next to nothing, so its calls "
            "are counted "
            "instead. Cost model: how much faster at best, from the split of the first line.",
            f"The floor that no saving touches, answers and judging, is "
            f"{floor['floor'] / floor['nothing']:.0%} of the "
            "time here; with a 14B judge and 400 questions it is most of it.",
            f"Prefix reuse runs {shared} steps in place of {alone}.",
            *(
                f"Sampling {int(n):,} rows of width 64 takes {found['stratified'][1]:.0f} MiB beside the "
                f"embeddings and "
                f"{found['stratified'][0]:.1f} CPU s; the n x n matrix of the release takes "
                + (
                    f"{found['matrix'][1]:.0f} MiB."
                    if "matrix" in found
                    else f"{4 * int(n) ** 2 / 2**20:,.0f} MiB (4 n^2)."
                )
                for n, found in memory.items()
            ),
        ],
        details={"measured": measured, "memory": memory, "cost_model": floor, "summary": summary},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
