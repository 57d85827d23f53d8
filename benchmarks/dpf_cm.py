"""Speed of the data operators and of the vector database: ``python -m benchmarks.dpf_cm [ops] [stores]``.

Operators on real Chinese rows (repeated with changed characters up to the size), MinHash beside datasketch,
which runs in an interpreter of its own (environment variable ``HFP_DATASKETCH_PYTHON``); stores and the
guard's scan beside a flat numpy scan. Times are CPU time of the process, as this says more on a shared
machine; wall time is kept in the details.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars

from benchmarks.record import spread, write_result
from hf_plugins.data_ops import OpContext, make_op, with_row_ids
from hf_plugins.dpf_cm.keys import best_match
from hf_plugins.dpf_cm.storage import Rows, open_store
from tools.real_data import data_set, read_rows

COMMAND = "python -m benchmarks.dpf_cm"
_PEER = r"""
import json, sys, time
from datasketch import MinHash, MinHashLSH
texts = json.load(open(sys.argv[1], encoding="utf-8"))
start, cpu = time.perf_counter(), time.process_time()
lsh, kept = MinHashLSH(threshold=0.8, num_perm=128), 0
for i, text in enumerate(texts):
    m = MinHash(num_perm=128)
    m.update_batch([text[j : j + 3].encode() for j in range(max(1, len(text) - 2))])
    if not lsh.query(m):
        lsh.insert(str(i), m)
        kept += 1
print(json.dumps({"cpu": time.process_time() - cpu, "wall": time.perf_counter() - start, "kept": kept}))
"""


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


def _peer(texts: Sequence[str]) -> dict[str, float] | None:
    python = os.environ.get("HFP_DATASKETCH_PYTHON")
    if not python:
        return None
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump(list(texts), file)
        file.flush()
        done = subprocess.run([python, "-c", _PEER, file.name], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def ops(sizes: Sequence[int], repeats: int) -> None:
    """Rows a second of each operator."""
    key = ["question", "answer"]
    specs: list[tuple[str, dict[str, Any]]] = [
        ("clean_html_mapper", {"text_key": key}),
        ("pii_redaction_mapper", {"text_key": key}),
        ("character_repetition_filter", {"text_key": key}),
        ("word_repetition_filter", {"text_key": key}),
        ("special_characters_filter", {"text_key": key}),
        ("words_num_filter", {"text_key": key}),
        ("document_minhash_deduplicator", {"text_key": key}),
    ]
    table, details = [], {}
    for size in sizes:
        given = rows(size)
        data = with_row_ids(Dataset.from_list(given))
        for name, params in specs:
            rounds = [
                _timed(lambda n=name, p=params, d=data: len(make_op({n: p}).run(d, OpContext())))[:2]
                for _ in range(repeats)
            ]
            cpu = [size / r[0] for r in rounds]
            details[f"{name}/{size}"] = rounds
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            table.append([name, f"{size:,}", f"{spread([round(c) for c in cpu])}", f"{memory:.2f}"])
        peer = _peer([f"{r['question']}\n{r['answer']}" for r in given])
        if peer is not None:
            details[f"datasketch/{size}"] = peer
            table.append(
                ["datasketch 2.0 (MinHash and LSH, 128)", f"{size:,}", f"{size / peer['cpu']:.3g}", "-"]
            )
    write_result(
        "dpf_cm_ops",
        command=COMMAND + " ops",
        config={"sizes": list(sizes), "repeats": repeats},
        seeds=[0],
        packages=("datasets", "rensa"),
        columns=["operator", "rows", "rows a second of CPU (range)", "peak memory so far, GiB"],
        rows=table,
        notes=[
            "Real Chinese consultations; beyond 2,500 rows copies with a third of the characters changed. "
            "One process. The "
            "deduplicator checks each candidate exactly; datasketch takes the estimate and does not.",
            "Data-Juicer was not measured: its first operator installs its own torch at run time.",
        ],
        details=details,
    )


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
        scan = [_timed(lambda k=keys, q=wanted: best_match(q, k))[:2] for _ in range(repeats)]
        half = keys.bfloat16()
        low = [_timed(lambda k=half, q=wanted: best_match(q, k))[:2] for _ in range(repeats)]
        flat = [_timed(lambda v=vectors, q=query: (v @ q).max())[:2] for _ in range(repeats)]
        details[str(size)] = {"scan": scan, "bf16": low, "numpy": flat}
        line = [f"{size:,}", *[f"{spread([1000 * t[1] for t in part])}" for part in (scan, low, flat)]]
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
            "guard's scan, ms a prompt",
            "in bf16",
            "flat numpy scan, ms",
            "lancedb: build, s",
            "exact query, ms",
            "numpy store: build, s",
            "exact query, ms (reads the file)",
        ],
        rows=table,
        notes=[
            f"Width {width}, fp32 unless said, wall time, median (range) of {repeats}. The scan is what a "
            "prompt pays once; tokens "
            "pay a hash look-up each. It is bound by memory bandwidth.",
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
        "--keys", default="1000,100000,1000000", help="sizes of the store, with commas between"
    )
    args = parser.parse_args()
    wanted = tuple(int(word) for word in args.keys.split(","))
    disable_progress_bars()
    small = args.short
    if small:
        import benchmarks.record

        benchmarks.record.write_result.__kwdefaults__["folder"] = Path(tempfile.gettempdir()) / "mmhf_short"
    parts = {
        "ops": lambda: ops((200,) if small else (10_000, 100_000), 1 if small else 2),
        "stores": lambda: stores((1000,) if small else wanted, 64 if small else 384, 3 if small else 5),
    }
    for name in args.parts or parts:
        if name not in parts:
            parser.error(f"no part {name!r}; there are {', '.join(parts)}")
        parts[name]()
        print(json.dumps({"benchmark": "dpf_cm", "part": name, "done": True}), flush=True)


if __name__ == "__main__":
    main()
