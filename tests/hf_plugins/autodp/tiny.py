"""Small pieces of the tests: rows, a model, an evaluation by table."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_plugins.autodp.dataset import ANSWER, QUESTION
from hf_plugins.autodp.model import tiny_model, write_demo
from hf_plugins.autodp.trainer import TrainJob
from hf_plugins.data_ops.op import with_row_ids

PAIRS = [
    (f"What is number {i} good for?", f"Number {i} is good for counting {i * 7} things.") for i in range(60)
]


def rows(pairs: Sequence[tuple[str, str]] = PAIRS, **columns: list[Any]) -> Dataset:
    questions, answers = ([pair[side] for pair in pairs] for side in (0, 1))
    return with_row_ids(Dataset.from_dict({QUESTION: questions, ANSWER: answers} | columns))


def model(folder: Path) -> Path:
    return tiny_model(folder, [f"{question}\n{answer}" for question, answer in PAIRS], vocabulary=280)


def demo(folder: Path) -> Path:
    write_demo(folder)
    return folder


def write_jsonl(path: Path, table: Sequence[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in table) + "\n", encoding="utf-8")
    return path


def by_table(
    score: Callable[[Dataset], float], seen: list[TrainJob] | None = None
) -> Callable[..., dict[str, Any]]:
    """An evaluation whose losses are a function of the rows, in place of a training."""
    from datasets import load_from_disk

    def evaluate(job: TrainJob, *, isolate: bool = True, launch: str = "") -> dict[str, Any]:
        if seen is not None:
            seen.append(job)
        value = score(load_from_disk(job.rows))
        count = len(load_from_disk(job.questions))
        losses = [2 - value + 0.01 * (index % 5) for index in range(count)]
        return {"steps": 1, "losses": losses, "answers": [""] * count, "seconds": {"train": 0.1, "gen": 0.1}}

    return evaluate
