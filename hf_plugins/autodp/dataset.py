"""Rows in, rows out: reading any common schema, disjoint splits, the sample, and strategies run step by
step.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from hf_plugins.autodp.features import hash_embed
from hf_plugins.autodp.sampling import sample_rows
from hf_plugins.autodp.storage import Cache
from hf_plugins.autodp.strategies import Step, Strategy
from hf_plugins.data_ops.op import (
    ROW_ID,
    DataOp,
    Ledger,
    OpContext,
    canonical,
    content_key,
    digest,
    make_op,
    with_row_ids,
)

logger = logging.getLogger(__name__)

QUESTION, ANSWER, HISTORY, DIRTY = "question", "answer", "history", "needs_work"
MISSING = ("", "无")
# Pairs of columns that are understood without being named.
SCHEMAS = (
    ("question", "answer"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("ask", "answer"),
    ("query", "response"),
)
_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def read_rows(path: str | Path, *, question: str = "", answer: str = "") -> Dataset:
    """Question-answer rows of a file or folder; other columns stay as they are.

    Args:
        path: ``.jsonl``, ``.json``, ``.csv`` (plain or ``.gz``), ``.parquet``, or a folder of `save_to_disk`.
        question: Column of questions; empty: found by the usual names, Alpaca's ``input`` and chat messages
            too.
        answer: Column of answers.

    Returns:
        Rows with ``question``, ``answer``, where there were more turns ``history``, and ``row_id``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or no pair of columns is known.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"no file or folder {str(path)!r}; give the rows as .jsonl, .csv or .parquet."
        )
    if path.is_dir():
        try:
            rows = load_from_disk(str(path))
        except (OSError, ValueError, IndexError) as error:
            # IndexError: what `datasets` makes of a table without rows.
            raise ValueError(f"{path} holds no rows that save_to_disk wrote ({error}).") from error
    else:
        kind = _KINDS.get(Path(path.name.removesuffix(".gz")).suffix)
        if kind is None:
            raise ValueError(
                f"{path.name} is none of {', '.join(_KINDS)} (or .gz of them); convert it first."
            )
        try:
            rows = load_dataset(kind, data_files=str(path), split="train")
        except (DatasetGenerationError, ValueError) as error:
            cause = str(error.__cause__ or error).splitlines()[0]
            raise ValueError(f"{path} cannot be read as {kind}: {cause} Check its first lines.") from error
    if len(rows) == 0:
        raise ValueError(f"{path} holds no rows.")
    return with_row_ids(_paired(rows, question, answer))


def _paired(rows: Dataset, question: str, answer: str) -> Dataset:
    names = set(rows.column_names)
    turns = next((name for name in ("messages", "conversations") if name in names), None)
    if question or answer:
        pair = (question or QUESTION, answer or ANSWER)
        if absent := sorted(set(pair) - names):
            raise ValueError(
                f"the rows have no column {', '.join(absent)}, only {', '.join(rows.column_names)}."
            )
    else:
        pair = next((schema for schema in SCHEMAS if set(schema) <= names), ("", ""))
        if not pair[0] and turns is None:
            raise ValueError(
                f"no known pair of question and answer among {', '.join(rows.column_names)}; name the "
                "columns with --question and --answer."
            )

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        if pair[0]:
            asked, answered = row[pair[0]], row[pair[1]]
            if pair[0] == "instruction" and row.get("input"):
                asked = f"{asked}\n{row['input']}"
            return {QUESTION: _text(asked), ANSWER: _text(answered)}
        return _last_turn(row[turns])

    drop = [name for name in (*pair, turns if not pair[0] else "") if name in names - {QUESTION, ANSWER}]
    return rows.map(convert, remove_columns=drop)


def _last_turn(turns: Any) -> dict[str, Any]:
    """Messages as history, last question and last answer; both chat and ShareGPT spelling."""
    roles = {"human": "user", "gpt": "assistant"}
    messages = [
        {
            "role": roles.get(role := turn.get("role") or turn.get("from") or "", role),
            "content": _text(turn.get("content", turn.get("value"))),
        }
        for turn in turns or []
    ]
    answer = messages.pop()["content"] if messages and messages[-1]["role"] == "assistant" else ""
    question = messages.pop()["content"] if messages and messages[-1]["role"] == "user" else ""
    return {QUESTION: question, ANSWER: answer, HISTORY: messages}


def _text(value: Any) -> str:
    text = "" if value is None else str(value)
    return "" if text.strip() in MISSING else text


def pair_texts(rows: Dataset) -> list[str]:
    """Question and answer of each row as one text."""
    return [f"{q}\n{a}" for q, a in zip(rows[QUESTION], rows[ANSWER], strict=True)]


def split_rows(rows: Dataset, sizes: Mapping[str, int], *, seed: int) -> dict[str, Dataset]:
    """Disjoint parts of given sizes and the rest as ``train``.

    Rows with the same question go to the same part, and the choice depends on the question alone: no question
    that is scored on was trained on, also after rows are added.

    Raises:
        ValueError: If fewer than half of the rows would be left to train on.
    """
    groups: dict[str, list[int]] = {}
    for index, text in enumerate(rows[QUESTION]):
        groups.setdefault(digest(str(seed), " ".join(text.lower().split())), []).append(index)
    if 2 * sum(sizes.values()) > len(groups):
        raise ValueError(
            f"{len(rows)} rows with {len(groups)} different questions cannot give "
            f"{', '.join(f'{size} {name}' for name, size in sizes.items())} rows and more to train on; lower "
            "num_dev, num_test or num_anchors."
        )
    order = iter(sorted(groups))
    found: dict[str, Dataset] = {}
    for name, size in sizes.items():
        chosen: list[int] = []
        while len(chosen) < size:
            # One row of a question is enough to ask it; its repetitions are left out of all parts.
            chosen.append(groups[next(order)][0])
        found[name] = rows.select(sorted(chosen))
    found["train"] = rows.select(sorted(index for key in order for index in groups[key]))
    return found


def without_questions(rows: Dataset, held_out: list[Dataset]) -> Dataset:
    """Training rows whose question stands in none of the held-out sets."""
    asked = {" ".join(text.lower().split()) for part in held_out for text in part[QUESTION]}
    keep = [index for index, text in enumerate(rows[QUESTION]) if " ".join(text.lower().split()) not in asked]
    if len(keep) < len(rows):
        logger.warning("%d training rows ask a held-out question and are left out", len(rows) - len(keep))
    return rows.select(keep)


def take_sample(
    rows: Dataset,
    ratio: float,
    *,
    method: str,
    seed: int,
    embed: Callable[[list[str]], np.ndarray] = hash_embed,
) -> Dataset:
    """The rows on which strategies are tried: classes are clean and dirty, see `sample_rows`."""
    dirty = np.array(rows[DIRTY]) if DIRTY in rows.column_names else np.ones(len(rows), bool)
    chosen = sample_rows(embed(pair_texts(rows)), dirty, ratio, method=method, seed=seed)
    return rows.select(chosen)


@dataclass(kw_only=True)
class Prepared:
    """Rows after a strategy."""

    key: str
    rows: Dataset
    steps: list[dict[str, Any]] = field(default_factory=list)
    """A step each: name, key, rows, ledger's counts, seconds of work when it ran, whether it was stored."""


class StrategyRunner:
    """Runs strategies on tables, each step under a content key, so that common beginnings run once.

    ``key_k = H(key_{k-1}, fingerprints of the step's operators)``; a fingerprint holds the operator's name,
    version, parameters, prompt templates, files and the identity of the models it asks.

    Args:
        cache: Where tables are kept.
        make_ops: Operators of a step.
        context: Clients, processes, progress of operators.
    """

    def __init__(self, cache: Cache, make_ops: Callable[[Step], list[DataOp]], context: OpContext) -> None:
        self.cache = cache
        self.make_ops = make_ops
        self.context = context
        self.team_runs = 0
        self._keys: dict[str, str] = {}

    def run(self, strategy: Strategy, rows: Dataset) -> Prepared:
        """Apply the steps in order."""
        rows = with_row_ids(rows)
        if rows._fingerprint not in self._keys:
            self._keys[rows._fingerprint] = content_key(rows)
        key = self._keys[rows._fingerprint]
        # Without reuse each strategy has tables of its own.
        salt = "" if self.cache.reuse else canonical([str(step) for step in strategy])
        table, note = self.cache.table(digest(key, salt), lambda: (rows, {}))
        key, done = digest(key, salt), []
        for step in strategy:
            ops = self.make_ops(step)
            key = digest(key, *(op.fingerprint(self.context) for op in ops))
            before, runs = table, self.team_runs

            def build(before: Dataset = before, ops: list[DataOp] = ops) -> tuple[Dataset, dict[str, Any]]:
                start = time.perf_counter()
                self.team_runs += 1
                ledger = Ledger()
                context = OpContext(
                    ledger, self.context.num_proc, self.context.clients, self.context.progress
                )
                found = before
                with _no_map_files():
                    for op in ops:
                        found = op.run(found, context)
                counts = {f"{op} {action}": number for (op, action), number in ledger.counts().items()}
                return found, {"ledger": counts, "seconds": time.perf_counter() - start}

            table, note = self.cache.table(key, build)
            stored = runs == self.team_runs
            done.append({"step": str(step), "key": key, "rows": len(table), "stored": stored} | note)
        return Prepared(key=key, rows=table, steps=done)


@contextmanager
def _no_map_files() -> Iterator[None]:
    """Keep `Dataset.map` from leaving its files beside its input, which would double the cache."""
    before = datasets.is_caching_enabled()
    datasets.disable_caching()
    try:
        yield
    finally:
        if before:
            datasets.enable_caching()


def clean_ops(
    tokenizer: str, *, history: bool, threshold: float = 0.7, min_tokens: int = 20, max_tokens: int = 2560
) -> list[DataOp]:
    """CLEAN in the paper's order: duplicates, noise, odd characters, length, repetition.

    Near-duplicates are found on characters, which works for Chinese too; repetition is measured on runs of 10
    characters, because the share of repeated pairs, the release's measure, grows with any text's length.
    """
    pair = (QUESTION, ANSWER)
    texts = (*pair, HISTORY) if history else pair
    specs: list[dict[str, dict[str, Any]]] = [
        {"document_minhash_deduplicator": {"text_key": texts, "jaccard_threshold": threshold}},
        *noise_specs(texts),
        {"remove_specific_chars_mapper": {"text_key": texts}},
        {
            "token_num_filter": {
                "text_key": pair,
                "hf_tokenizer": tokenizer,
                "min_num": min_tokens,
                "max_num": max_tokens,
            }
        },
        {"character_repetition_filter": {"text_key": pair, "rep_len": 10, "max_ratio": 0.6}},
    ]
    return [make_op(spec) for spec in specs]


def noise_specs(texts: tuple[str, ...]) -> list[dict[str, dict[str, Any]]]:
    """Markup, addresses and blanks."""
    names = ("clean_html_mapper", "clean_email_mapper", "clean_ip_mapper", "clean_links_mapper")
    return [{name: {"text_key": texts}} for name in (*names, "whitespace_normalization_mapper")]


def row_cells(rows: Dataset) -> Callable[[], Any]:
    """An iterator factory over every text cell of the rows, for the privacy contract."""

    def strings(value: Any) -> Any:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            for item in value.values():
                yield from strings(item)
        elif isinstance(value, list):
            for item in value:
                yield from strings(item)

    def cells() -> Any:
        for row in rows:
            for name, value in row.items():
                if name != ROW_ID:
                    yield from strings(value)

    return cells
