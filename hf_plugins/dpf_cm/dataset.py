"""Rows in and out: files of many forms into one, instructions for them, rows as trl reads them."""

import gzip
import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from datasets import Dataset, Features, List, Value, concatenate_datasets

from hf_plugins.data_ops.chat import Sampling
from hf_plugins.data_ops.llm_ops import CHUNK, set_column
from hf_plugins.data_ops.op import ROW_ID, DataOp, Ledger, OpContext, digest, register, with_row_ids
from hf_plugins.data_ops.prompts import check_lang
from hf_plugins.dpf_cm.chained_examples import Example, chained_prompt, draw_graded

_TURN = {"role": Value("string"), "content": Value("string")}
DIALOGUE = Features(
    {
        "question": Value("string"),
        "answer": Value("string"),
        "instruction": Value("string"),
        "history": List(_TURN),
        "source": Value("string"),
    }
)
TEXT = Features({"text": Value("string"), "source": Value("string")})
PAIR = Features(
    {
        "prompt": Value("string"),
        "chosen": Value("string"),
        "rejected": Value("string"),
        "history": List(_TURN),
        "source": Value("string"),
    }
)
SEED = Features({"question": Value("string"), "instruction": Value("string"), "source": Value("string")})
FORMATS = ("text", "qa", "alpaca", "sharegpt", "preference", "seeds")
_FEATURES = {"text": TEXT, "preference": PAIR, "seeds": SEED}
_ROLES = {
    "user": "user", "human": "user", "patient": "user", "assistant": "assistant", "gpt": "assistant",
    "doctor": "assistant", "system": "system",
}  # fmt: skip
_SOURCE_KEYS = frozenset({"files", "format", "keys", "encoding", "limit", "name"})


class Malformed(ValueError):
    """A row that cannot be read; the reader records it and goes on."""


def read_sources(
    sources: Sequence[Mapping[str, Any]],
    *,
    base: str | Path = ".",
    ledger: Ledger | None = None,
    max_row_bytes: int = 1_000_000,
) -> Dataset:
    """Read files into one data set of one form.

    A source is ``{files: [...], format: text|qa|alpaca|sharegpt|preference|seeds, keys: {question: ask, ...},
    encoding: utf-8, limit: 1000, name: ...}``. Files are JSON lines (plain or ``.gz``), or ``.txt`` with one
    text a line. A row that is no JSON, of another encoding, too long, or malformed is recorded in the ledger
    as dropped, with file and line, and the reader goes on.

    Args:
        sources: Sources of the same kind of row.
        base: Folder that relative paths start from.
        ledger: Receives what could not be read.
        max_row_bytes: Longer lines are put aside unread.

    Returns:
        The rows, with ``row_id``.

    Raises:
        ValueError: If a source is misspelt, or nothing at all could be read.
        FileNotFoundError: If a file is missing.
    """
    ledger = ledger if ledger is not None else Ledger()
    parts = []
    for source in sources:
        form, rows = _check_source(source), []
        name = source.get("name", form)
        for file in source["files"]:
            path = Path(base) / file
            if not path.is_file():
                raise FileNotFoundError(f"no file {path}; paths in a recipe start from the recipe's folder.")
            for number, row in _lines(path, source.get("encoding", "utf-8"), max_row_bytes):
                try:
                    if isinstance(row, Malformed):
                        raise row
                    rows.append(_convert(row, form, source.get("keys", {})) | {"source": name})
                except Malformed as error:
                    ledger.add("read", f"{path.name}:{number}", "dropped", str(error))
                if source.get("limit") is not None and len(rows) >= source["limit"]:
                    break
        features = _FEATURES.get(form, DIALOGUE)
        columns = {key: [row.get(key) for row in rows] for key in features}
        parts.append(Dataset.from_dict(columns, features=features))
    if len({tuple(part.column_names) for part in parts}) > 1:
        raise ValueError(
            "sources of one list must hold one kind of row: texts, dialogues, or pairs, not a mixture."
        )
    if not sum(map(len, parts)):
        why = (
            "; ".join(sorted({row["reason"] for row in ledger.rows(op="read")})[:3]) or "the files are empty"
        )
        raise ValueError(f"no row could be read ({why}). Check format and keys of the sources.")
    return with_row_ids(concatenate_datasets(parts))


def _check_source(source: Mapping[str, Any]) -> str:
    if not isinstance(source, Mapping) or not source.get("files"):
        raise ValueError(f"a source needs files: [...]; got {source!r}.")
    unknown = sorted(set(source) - _SOURCE_KEYS)
    if unknown:
        raise ValueError(f"a source has no {', '.join(unknown)}; it takes {', '.join(sorted(_SOURCE_KEYS))}.")
    form = source.get("format", "qa")
    if form not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {form!r}.")
    return form


def _lines(path: Path, encoding: str, limit: int) -> Iterator[tuple[int, Any]]:
    opened = gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")
    plain = path.name.removesuffix(".gz").endswith(".txt")
    with opened as file:
        number = 0
        # readline with a bound: a row of 100 MB never comes into memory.
        while line := file.readline(limit + 1):
            number += 1
            if len(line) > limit and not line.endswith(b"\n"):
                size = len(line)
                while rest := file.readline(1 << 20):
                    size += len(rest)
                    if rest.endswith(b"\n"):
                        break
                yield number, Malformed(f"row of {size} bytes is longer than max_row_bytes={limit}")
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                text = line.decode(encoding)
                yield number, {"text": text.rstrip("\r\n")} if plain else json.loads(text)
            except UnicodeDecodeError as error:
                yield (
                    number,
                    Malformed(f"not {encoding}: byte 0x{line[error.start]:02x}; set the source's encoding"),
                )
            except ValueError:
                yield number, Malformed("no JSON")


def _text(row: Mapping[str, Any], key: str, *, needed: bool = True) -> str:
    value = row.get(key)
    if value is None and not needed:
        return ""
    if not isinstance(value, str):
        raise Malformed(f"no text under {key!r}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Malformed(f"half a surrogate pair under {key!r}") from error
    if needed and not value.strip():
        raise Malformed(f"empty {key!r}")
    return value


def _convert(row: Any, form: str, keys: Mapping[str, str]) -> dict[str, Any]:
    """One row in our columns.

    Raises:
        Malformed: If something is missing or of the wrong kind.
    """
    if not isinstance(row, dict):
        raise Malformed("the row is no JSON object")
    if form == "text":
        return {"text": _text(row, keys.get("text", "text"))}
    if form == "seeds":
        return {k: _text(row, keys.get(k, k)) for k in ("question", "instruction")}
    if form == "sharegpt":
        turns = _turns(row.get(keys.get("conversations", "conversations")))
        return _dialogue(turns)
    if form == "alpaca":
        instruction, given = _text(row, "instruction"), _text(row, "input", needed=False)
        turns = []
        for pair in row.get("history") or []:
            if (
                not isinstance(pair, list | tuple)
                or len(pair) != 2
                or not all(isinstance(t, str) and t.strip() for t in pair)
            ):
                raise Malformed("history must hold pairs of texts")
            turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        question = f"{instruction}\n{given}" if given else instruction
        return _dialogue(
            [
                *turns,
                {"role": "user", "content": question},
                {"role": "assistant", "content": _text(row, "output")},
            ]
        )
    if form == "preference":
        return _preference(row, keys)
    return {
        "question": _text(row, keys.get("question", "question")),
        "answer": _text(row, keys.get("answer", "answer")),
        "instruction": _text(row, keys.get("instruction", "instruction"), needed=False) or None,
        "history": [],
    }


def _turns(conversation: Any) -> list[dict[str, str]]:
    if not isinstance(conversation, list) or not conversation:
        raise Malformed("conversations must be a list of turns")
    turns = []
    for turn in conversation:
        if not isinstance(turn, dict):
            raise Malformed("a turn is no object")
        role = _ROLES.get(str(turn.get("role", turn.get("from"))))
        if role is None:
            raise Malformed(f"unknown role {str(turn.get('role', turn.get('from')))[:20]!r}")
        turns.append({"role": role, "content": _text(turn, "content" if "content" in turn else "value")})
    return turns


def _dialogue(turns: list[dict[str, str]]) -> dict[str, Any]:
    instruction = None
    if turns and turns[0]["role"] == "system":
        instruction, turns = turns[0]["content"], turns[1:]
    expected = ["user", "assistant"] * (len(turns) // 2)
    if not turns or [turn["role"] for turn in turns] != expected:
        raise Malformed("user and assistant must take turns, the assistant last")
    return {
        "question": turns[-2]["content"],
        "answer": turns[-1]["content"],
        "instruction": instruction,
        "history": turns[:-2],
    }


def _preference(row: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    found = {}
    for name in ("chosen", "rejected"):
        value = row.get(keys.get(name, name))
        turn = value if isinstance(value, dict) else {"content": value}
        found[name] = _text(turn, "content" if "content" in turn else "value")
    if found["chosen"] == found["rejected"]:
        raise Malformed("chosen and rejected are equal")
    if "conversations" in row:
        turns = _turns(row["conversations"])
        if turns[-1]["role"] != "user":
            raise Malformed("the prompt must end with the user's turn")
        return found | {"prompt": turns[-1]["content"], "history": turns[:-1]}
    return found | {"prompt": _text(row, keys.get("prompt", "prompt")), "history": []}


@register
@dataclass(frozen=True, kw_only=True)
class ChainedInstructionMapper(DataOp):
    """Writes an ``instruction`` for each question that has none, from examples chained from worst to best.

    The examples of a question are drawn from the scored seeds, one from each range of scores, with a
    generator of the question's own; their ids stand in ``example_ids``.
    """

    name: ClassVar[str] = "chained_instruction_mapper"
    roles: ClassVar[tuple[str, ...]] = ("instructor",)
    question_key: str = "question"
    instruction_key: str = "instruction"
    seeds_file: str
    """JSON lines of ``id, question, instruction, score``."""
    num_examples: int = 3
    order: Literal["chain", "asc", "desc"] = "chain"
    seed: int = 0
    temperature: float = 0.7
    max_tokens: int = 256
    lang: Literal["zh", "en"] = "zh"

    def __post_init__(self) -> None:
        check_lang(self.name, self.lang)
        if self.num_examples < 1:
            raise ValueError(f"{self.name}: num_examples must be >= 1; got {self.num_examples}.")
        if self.order not in ("chain", "asc", "desc"):
            raise ValueError(
                f"{self.name}: order must be chain, asc (plain few-shot) or desc; got {self.order!r}."
            )

    def columns(self) -> tuple[str, ...]:
        """The question."""
        return (self.question_key,)

    def materials(self) -> tuple[str, ...]:
        """Hash of the seeds."""
        return (hashlib.sha256(Path(self.seeds_file).read_bytes()).hexdigest(),)

    def prompts(self) -> tuple[str, ...]:
        """Words of the chained prompt."""
        example = Example("", "", "", 0.0)
        return tuple(str(chained_prompt([example] * n, "", lang=self.lang, order=self.order)) for n in (1, 3))

    def apply(self, dataset: Dataset, context: OpContext) -> Dataset:
        """Draw, ask, fill in."""
        lines = Path(self.seeds_file).read_text(encoding="utf-8").split("\n")
        pool = [
            Example(**{k: row[k] for k in Example._fields}) for row in map(json.loads, filter(None, lines))
        ]
        ids, questions = list(dataset[ROW_ID]), list(dataset[self.question_key])
        given = (
            list(dataset[self.instruction_key])
            if self.instruction_key in dataset.column_names
            else [None] * len(ids)
        )
        todo = [i for i in range(len(ids)) if not given[i] and questions[i]]
        drawn = [
            draw_graded(pool, self.num_examples, random.Random(digest(str(self.seed), ids[i]))) for i in todo
        ]
        asked = [
            chained_prompt(d, questions[i], lang=self.lang, order=self.order)
            for i, d in zip(todo, drawn, strict=True)
        ]
        sampling = Sampling(temperature=self.temperature, max_tokens=self.max_tokens, seed=self.seed)
        used: list[str | None] = [None] * len(ids)
        client = context.client("instructor") if todo else None
        for start in range(0, len(todo), CHUNK):
            replies = client.complete_many(asked[start : start + CHUNK], sampling=sampling)  # type: ignore[union-attr]
            for place, reply in enumerate(replies, start):
                text = reply[0].rpartition("</think>")[2].strip()
                if not text:
                    context.ledger.add(self.name, ids[todo[place]], "flagged", "unparsed: empty instruction")
                    continue
                given[todo[place]] = text
                used[todo[place]] = ",".join(example.id for example in drawn[place])
                context.ledger.add(self.name, ids[todo[place]], "changed", "instruction written")
            if context.progress:
                context.progress(self.name, min(start + CHUNK, len(todo)), len(todo))
        dataset = set_column(dataset, self.instruction_key, given, Value("string"))
        return set_column(dataset, "example_ids", used, Value("string"))


def sft_rows(dataset: Dataset) -> Dataset:
    """Rows of ``prompt`` and ``completion`` messages, so that trl's loss counts the answer only."""

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        system = [{"role": "system", "content": row["instruction"]}] if row.get("instruction") else []
        return {
            "prompt": [*system, *(row["history"] or []), {"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }

    features = Features({"prompt": List(_TURN), "completion": List(_TURN)})
    return dataset.map(convert, remove_columns=dataset.column_names, features=features, desc="sft rows")


def pair_rows(dataset: Dataset) -> Dataset:
    """Rows of ``prompt``, ``chosen``, ``rejected`` messages for reward models and DPO."""

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return {
            "prompt": [*(row.get("history") or []), {"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }

    features = Features({"prompt": List(_TURN), "chosen": List(_TURN), "rejected": List(_TURN)})
    return dataset.map(convert, remove_columns=dataset.column_names, features=features, desc="pairs")
