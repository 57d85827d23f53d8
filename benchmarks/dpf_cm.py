"""Speed of the data operators and of the vector database: ``python -m benchmarks.dpf_cm [ops] [stores]``.

Operators on real Chinese rows (repeated with changed characters up to the size), beside Data-Juicer's
operator of the same name and datasketch, each in an interpreter of its own (environment variables
``HFP_DATAJUICER_PYTHON`` and ``HFP_DATASKETCH_PYTHON``). Every measurement is a process, kept in
``work_dirs/dpf_cm_speed`` as soon as it is done, so that a stopped run goes on. Stores and the guard's scan
beside a flat numpy scan. Times are CPU time, as this says more on a shared machine; wall time is kept in the
details.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import disable_progress_bars

from benchmarks.record import spread, write_result
from hf_plugins.dpf_cm.answer_grams import AnswerGrams
from hf_plugins.dpf_cm.keys import best_match
from hf_plugins.dpf_cm.storage import Rows, open_store
from tools.real_data import data_set, read_rows

COMMAND = "python -m benchmarks.dpf_cm"
WORK = Path("work_dirs/dpf_cm_speed")
# Each is run as: python -c SCRIPT rows.json operator parameters; the first run warms up and is not counted.
_CLOCK = r"""
import json, resource, sys, time
texts = json.load(open(sys.argv[1], encoding="utf-8"))
name, params = sys.argv[2], json.loads(sys.argv[3])
def used():
    # Data-Juicer maps in a child process even where it may use one process only.
    own, child = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cpu = sum(r.ru_utime + r.ru_stime for r in (own, child))
    return cpu, own.ru_maxrss / 1024, child.ru_maxrss / 1024
def measure(prepare, work):
    work(prepare(texts[:50]))
    data = prepare(texts)
    cpu, peak, _ = used()
    wall = time.perf_counter()
    kept = work(data)
    wall, (after, high, child) = time.perf_counter() - wall, used()
    mib = high - peak + max(0, child - peak)
    print(json.dumps({"cpu": after - cpu, "wall": wall, "kept": kept, "mib": mib}))
"""
_SIDES = {
    "ours": r"""
from datasets import Dataset, disable_progress_bars
from hf_plugins.data_ops import OpContext, make_op, with_row_ids
disable_progress_bars()
measure(
    lambda given: with_row_ids(Dataset.from_dict({"text": given})),
    lambda data: len(make_op({name: params}).run(data, OpContext())),
)
""",
    "Data-Juicer": r"""
import data_juicer.ops
from data_juicer.core.data import NestedDataset
from data_juicer.ops.base_op import OPERATORS
from datasets import disable_progress_bars
from loguru import logger
logger.remove()
disable_progress_bars()
def work(data):
    operator = OPERATORS.modules[name](num_proc=1, auto_op_parallelism=False, **params)
    return len(operator.run(data))
measure(lambda given: NestedDataset.from_dict({"text": given}), work)
""",
    "datasketch": r"""
from datasketch import MinHash, MinHashLSH
def work(data):
    lsh, kept = MinHashLSH(threshold=0.8, num_perm=128), 0
    for i, text in enumerate(data):
        m = MinHash(num_perm=128)
        m.update_batch([text[j : j + 3].encode() for j in range(max(1, len(text) - 2))])
        if not lsh.query(m):
            lsh.insert(str(i), m)
            kept += 1
    return kept
measure(list, work)
""",
}
_PEERS = {"Data-Juicer": "HFP_DATAJUICER_PYTHON", "datasketch": "HFP_DATASKETCH_PYTHON"}
# Operator, our parameters, Data-Juicer's where they differ.
_OPS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("clean_html_mapper", {}, {}),
    ("pii_redaction_mapper", {}, {}),
    ("character_repetition_filter", {"rep_len": 10, "max_ratio": 0.5}, {}),
    ("word_repetition_filter", {"rep_len": 10, "max_ratio": 0.5}, {"lang": "zh"}),
    ("special_characters_filter", {"max_ratio": 0.25}, {}),
    ("words_num_filter", {"min_num": 10}, {"lang": "zh"}),
    (
        "document_minhash_deduplicator",
        {"window_size": 3, "num_permutations": 128, "jaccard_threshold": 0.8},
        {"tokenization": "character"},
    ),
]
_LARGE = ("clean_html_mapper", "character_repetition_filter", "document_minhash_deduplicator")


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Real consultations, and beyond their number copies in which a third of the characters is changed."""
    found = [
        {"question": r["ask"], "answer": r["answer"]}
        for r in read_rows(data_set("zh_medical") / "patient_doctor_qa.jsonl.gz")
    ]
    rng = random.Random(seed)
    letters = sorted({c for row in found[:300] for c in row["answer"]})
    base = len(found)
    while len(found) < count:
        answer = found[rng.randrange(base)]["answer"]
        found.append(
            {
                "question": found[rng.randrange(base)]["question"],
                "answer": "".join(rng.choice(letters) if rng.random() < 0.33 else c for c in answer),
            }
        )
    return found[:count]


def _timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return time.process_time() - cpu, time.perf_counter() - wall, result


def _one(side: str, file: Path, name: str, params: dict[str, Any], kept: Path) -> dict[str, float] | None:
    """One measurement in a process of its own, from disk if it is there; None without its interpreter."""
    if kept.is_file():
        return json.loads(kept.read_text())
    python = sys.executable if side == "ours" else os.environ.get(_PEERS[side])
    if not python:
        return None
    # A peer must not install or fetch anything while it is measured.
    env = os.environ | {"UV_OFFLINE": "1", "PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1"}
    if side != "ours":
        env.pop("PYTHONPATH", None)
    command = [python, "-W", "ignore", "-c", _CLOCK + _SIDES[side], str(file), name, json.dumps(params)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise RuntimeError(f"{side}, {name}: {done.stderr.strip()[-800:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found))
    print(f"{side}, {name}, {file.stem}: {found}", flush=True)
    return found


def ops(sizes: Sequence[int], repeats: int, work: Path) -> None:
    """Rows a second of each operator, the sides in turn."""
    table, details = [], {}
    for size in sizes:
        file = work / f"{size}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([f"{r['question']}\n{r['answer']}" for r in rows(size)]), encoding="utf-8")
        for name, ours, theirs in _OPS:
            found: dict[str, list[dict[str, float]]] = {}
            dedup = name == "document_minhash_deduplicator"
            # A round of the slowest takes minutes at the large size: once, and peers of three kinds only.
            large = size > 10_000
            peers = (
                [] if large and name not in _LARGE else ["Data-Juicer", *(["datasketch"] if dedup else [])]
            )
            for turn in range(1 if large else repeats):
                for side in ("ours", *peers):
                    params = ours | theirs if side == "Data-Juicer" else ours
                    record = work / f"{side}-{name}-{size}-{turn}.json"
                    one = _one(side, file, name, params, record)
                    if one is not None:
                        found.setdefault(side, []).append(one)
            base = [size / r["cpu"] for r in found["ours"]]
            for side, records in found.items():
                speed = [size / r["cpu"] for r in records]
                ratio = [a / b for a, b in zip(base, speed, strict=True)]
                table.append(
                    [
                        name,
                        f"{size:,}",
                        side,
                        spread([round(v) for v in speed]) if len(speed) > 1 else f"{speed[0]:.3g}",
                        "1" if side == "ours" else spread(ratio) if len(ratio) > 1 else f"{ratio[0]:.3g}",
                        f"{max(r['mib'] for r in records):.0f}",
                        f"{size - records[0]['kept']:,.0f}",
                    ]
                )
            details[f"{name}/{size}"] = found
    write_result(
        "dpf_cm_ops",
        command=f"{COMMAND} ops --rows {','.join(map(str, sizes))}",
        config={"sizes": list(sizes), "repeats": repeats, "operators": [list(spec) for spec in _OPS]},
        seeds=[0],
        packages=("datasets", "rensa"),
        columns=[
            "operator",
            "rows",
            "side",
            "rows a second of CPU (range)",
            "ours faster by",
            "memory, MiB",
            "rows dropped",
        ],
        rows=table,
        notes=[
            "Real Chinese consultations; beyond 2,500 rows copies with a third of the characters changed. "
            "One process each, rows in memory, the same parameters; a warm-up on 50 rows is not counted. "
            "Memory is the rise of the peak while the operator runs.",
            "Ours also writes the ledger of rows and reasons, and the deduplicator checks each candidate "
            "exactly; datasketch and Data-Juicer take the estimate.",
            "Data-Juicer 1.6.1 and datasketch 2.0 in environments of their own. Data-Juicer's words are what "
            "blanks separate (its word models are a download), so its word counts and runs differ from "
            "ours, which count characters in Chinese.",
        ],
        details=details,
    )


def _grams(count: int) -> AnswerGrams:
    """A set of as many n-grams, none of which the measured tail completes."""
    grams = AnswerGrams(10, secret=b"s" * 32)
    rng = np.random.default_rng(1)
    for start in range(0, count, 100):
        ids = rng.integers(0, 30_000, 109).tolist()
        grams.add(str(start), grams.grams(ids))
    return grams


def stores(sizes: Sequence[int], width: int, repeats: int) -> None:
    """Building, one exact query, and the guard's scan in memory."""
    table, details = [], {}
    for size in sizes:
        rng = np.random.default_rng(0)
        vectors = rng.standard_normal((size, width), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        query = vectors[size // 2]
        data = Rows([f"s{i}" for i in range(size)], np.zeros(size, np.int32), vectors, [b"{}"] * size)
        keys, wanted = torch.from_numpy(vectors), torch.from_numpy(query)[None]
        half, grams = keys.bfloat16(), _grams(size)
        tail = list(range(9))
        sides: dict[str, Callable[[], Any]] = {
            "scan": lambda k=keys, q=wanted: best_match(q, k),  # type: ignore[misc]
            "bf16": lambda k=half, q=wanted: best_match(q, k),  # type: ignore[misc]
            "numpy": lambda v=vectors, q=query: (v @ q).max(),  # type: ignore[misc]
            "token": lambda g=grams, t=tail: g.completions(t),  # type: ignore[misc]
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        # In turn, and one round that is not counted: the first touch of a matrix is dearer than a scan.
        for turn in range(repeats + 1):
            for name, work in sides.items():
                cpu, wall, _ = _timed(work)
                if turn:
                    times[name].append((cpu, wall))
        details[str(size)] = dict(times)
        line = [
            f"{size:,}",
            *[spread([1000 * t[0] for t in times[name]]) for name in ("scan", "bf16", "numpy")],
        ]
        line.append(spread([1e6 * t[1] for t in times["token"]]))
        if size <= 100_000:
            with tempfile.TemporaryDirectory() as folder:
                for kind in ("lancedb", "numpy"):
                    store = open_store(kind, str(Path(folder) / kind))
                    build = _timed(lambda s=store, d=data: s.add(d))
                    search = [_timed(lambda s=store, q=query: s.search(q, 0.8)) for _ in range(repeats)]
                    details[str(size)][kind] = {"build": build[:2], "search": [s[:2] for s in search]}
                    line += [f"{build[1]:.2f}", f"{spread([1000 * s[1] for s in search])}"]
        else:
            line += ["-"] * 4
        table.append(line)
    write_result(
        "dpf_cm_stores",
        command=f"{COMMAND} stores --keys {','.join(map(str, sizes))}",
        config={"sizes": list(sizes), "width": width, "repeats": repeats},
        seeds=[0],
        packages=("lancedb", "numpy"),
        columns=[
            "keys",
            "guard's scan, CPU ms a prompt",
            "in bf16",
            "flat numpy scan, CPU ms",
            "look-up of the output guard, us a token",
            "lancedb: build, s",
            "exact query, ms",
            "numpy store: build, s",
            "exact query, ms (reads the file)",
        ],
        rows=table,
        notes=[
            f"Width {width}, fp32 unless said; median (range) of {repeats}, sides in turn; stores in wall "
            "time. The scan is what a prompt pays once and is bound by memory bandwidth; a token pays one "
            "hash look-up in as many n-grams as there are keys.",
        ],
        details=details,
    )  # fmt: skip


def main() -> None:
    """Run the parts that are named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help="ops, stores; both by default")
    parser.add_argument(
        "--short", action="store_true", help="tiny settings; writes nothing into docs/results"
    )
    parser.add_argument(
        "--rows", default="10000,100000", help="sizes of the operators' data, with commas between"
    )
    parser.add_argument(
        "--keys", default="1000,100000,1000000", help="sizes of the store, with commas between"
    )
    args = parser.parse_args()
    wanted, counts = (tuple(int(word) for word in given.split(",")) for given in (args.keys, args.rows))
    disable_progress_bars()
    small = args.short
    if small:
        import benchmarks.record

        benchmarks.record.write_result.__kwdefaults__["folder"] = Path(tempfile.gettempdir()) / "mmhf_short"
    parts = {
        "ops": lambda: ops((200,) if small else counts, 1 if small else 2, WORK / "short" if small else WORK),
        "stores": lambda: stores((1000,) if small else wanted, 64 if small else 384, 3 if small else 5),
    }
    for name in args.parts or parts:
        if name not in parts:
            parser.error(f"no part {name!r}; there are {', '.join(parts)}")
        parts[name]()
        print(json.dumps({"benchmark": "dpf_cm", "part": name, "done": True}), flush=True)


if __name__ == "__main__":
    main()
