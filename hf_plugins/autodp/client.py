"""Operators that ask a language model (they see rows), and who may be asked: models on this machine, unless
the user says otherwise in words.
"""

import ipaddress
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import numpy as np
from datasets import Dataset

from hf_plugins.autodp.config import CONSENT
from hf_plugins.autodp.dataset import ANSWER, DIRTY, QUESTION
from hf_plugins.autodp.row_value import deita_select, keep_best
from hf_plugins.data_ops.chat import ChatClient, Sampling, make_client
from hf_plugins.data_ops.op import ROW_ID, DataOp, OpContext, digest, register
from hf_plugins.data_ops.text import has_cjk

WRITING = {"temperature": 0.7, "top_p": 0.8}
OBJECT = "Reply with one JSON object and nothing else: "
_PAIR = "Question: {question}\nAnswer: {answer}"
_PAIR_ZH = "问题：{question}\n回答：{answer}"
_OBJECT_ZH = "只输出一个JSON对象："
_RULES = "so that it is accurate, safe, fluent and concise; keep its meaning and its length within 10 %.\n"
_RULES_ZH = "使其准确、安全、流畅、简洁，保持原意，长度变化不超过10%。\n"
_ASKED, _ANSWERED = '{{"question": "..."}}', '{{"answer": "..."}}'
_BOTH = '{{"question": "...", "answer": "..."}}'
PROMPTS = {
    "en": {
        "question": "Write the question that this answer answers. Examples of pairs:\n{examples}\n\n"
        f"Answer: {{answer}}\n{OBJECT}{_ASKED}",
        "answer": "Answer the question. Examples of pairs:\n{examples}\n\n"
        f"Question: {{question}}\n{OBJECT}{_ANSWERED}",
        "pair": "Write one new question with its answer, in the manner of these pairs:\n{examples}\n"
        f"{OBJECT}{_BOTH}",
        "better_question": f"Rewrite the question {_RULES}{_PAIR}\n{OBJECT}{_ASKED}",
        "better_answer": f"Rewrite the answer {_RULES}{_PAIR}\n{OBJECT}{_ANSWERED}",
        "screen": "Does this question-answer pair need rewriting (wrong, unsafe, garbled or badly written)? "
        f"Reply yes or no.\n{_PAIR}",
        "complexity": "How complex is this instruction? Reply with one number from 1 to 6.\n{question}",
        "quality": f"How good is this answer? Reply with one number from 1 to 6.\n{_PAIR}",
    },
    "zh": {
        "question": "请写出下面回答所对应的问题。示例：\n{examples}\n\n"
        f"回答：{{answer}}\n{_OBJECT_ZH}{_ASKED}",
        "answer": "请回答下面的问题。示例：\n{examples}\n\n" + f"问题：{{question}}\n{_OBJECT_ZH}{_ANSWERED}",
        "pair": "请参照以下问答对，写出一个新的问题及其回答：\n{examples}\n" + f"{_OBJECT_ZH}{_BOTH}",
        "better_question": f"请改写问题，{_RULES_ZH}{_PAIR_ZH}\n{_OBJECT_ZH}{_ASKED}",
        "better_answer": f"请改写回答，{_RULES_ZH}{_PAIR_ZH}\n{_OBJECT_ZH}{_ANSWERED}",
        "screen": f"以下问答文本是否需要优化？只回答是或否。\n{_PAIR_ZH}",
        "complexity": "这条指令的复杂程度如何？只输出1到6之间的一个数字。\n{question}",
        "quality": f"这个回答的质量如何？只输出1到6之间的一个数字。\n{_PAIR_ZH}",
    },
}


def all_prompts() -> tuple[str, ...]:
    """Every template, for fingerprints."""
    return tuple(text for texts in PROMPTS.values() for text in texts.values())


def fill(name: str, values: Mapping[str, str]) -> list[dict[str, str]]:
    """One request in the language of its values."""
    language = "zh" if has_cjk("".join(values.values())) else "en"
    return [{"role": "user", "content": PROMPTS[language][name].format(**values)}]


def read_object(text: str, keys: Sequence[str]) -> dict[str, str] | None:
    """The first JSON object of a reply that holds all keys as texts, or None."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\{", text.rsplit("</think>", 1)[-1]):
        try:
            found, _ = decoder.raw_decode(text.rsplit("</think>", 1)[-1], match.start())
        except json.JSONDecodeError:
            continue
        if isinstance(found, dict) and all(isinstance(found.get(k), str) and found[k].strip() for k in keys):
            return {key: found[key].strip() for key in keys}
    return None


def near_length(new: str, old: str, tolerance: float) -> bool:
    """Whether a rewritten text keeps its length within a share of the old one."""
    return abs(len(new) - len(old)) <= tolerance * len(old)


def _ask(op: DataOp, role: str, requests: list[Any], context: OpContext, sampling: Sampling) -> list[str]:
    client = context.client(role)
    if not client.data_plane:
        raise ValueError(
            f"{op.name} shows rows to the client of {role!r}, which may see none (data_plane=False)."
        )
    progress = context.progress
    watch = (lambda done, total: progress(op.name, done, total)) if progress else None
    return [answers[0] for answers in client.complete_many(requests, sampling=sampling, progress=watch)]


def _examples(pairs: list[tuple[str, str]], key: str, number: int = 4) -> str:
    """Complete pairs drawn by a key, so that the same row always sees the same examples."""
    some = random.Random(key).sample(pairs, min(number, len(pairs)))
    return "\n".join(f"Question: {question}\nAnswer: {answer}" for question, answer in some)


def _complete(rows: Dataset) -> list[tuple[str, str]]:
    pairs = zip(rows[QUESTION], rows[ANSWER], strict=True)
    return [(q, a) for q, a in pairs if q.strip() and a.strip()]


def _replace(rows: Dataset, changes: Mapping[str, Sequence[str]]) -> Dataset:
    features = rows.features
    for name, values in changes.items():
        rows = rows.remove_columns(name).add_column(name, list(values))
    return rows.select_columns(list(features)).cast(features)


@register
@dataclass(frozen=True, kw_only=True)
class FillMissingMapper(DataOp):
    """Writes the question of an answer that has none, and the answer of a question that has none, from four
    examples; what cannot be read leaves the row as it was.
    """

    name: ClassVar[str] = "fill_missing_mapper"
    roles: ClassVar[tuple[str, ...]] = ("writer",)
    seed: int = 0

    def prompts(self) -> tuple[str, ...]:
        """All templates."""
        return all_prompts()

    def columns(self) -> tuple[str, ...]:
        """Question and answer."""
        return QUESTION, ANSWER

    def apply(self, dataset: Dataset, context: OpContext) -> Dataset:
        """Fill what is missing."""
        pairs = _complete(dataset)
        texts = {QUESTION: list(dataset[QUESTION]), ANSWER: list(dataset[ANSWER])}
        wanted, requests = [], []
        for index, row_id in enumerate(dataset[ROW_ID]):
            gaps = [name for name in (QUESTION, ANSWER) if not texts[name][index].strip()]
            if len(gaps) == 1 and pairs:
                values = {name: texts[name][index] for name in (QUESTION, ANSWER)}
                examples = _examples(pairs, f"{self.seed}/{digest(values[QUESTION], values[ANSWER])}")
                requests.append(fill(gaps[0], values | {"examples": examples}))
                wanted.append((index, gaps[0], row_id))
        sampling = Sampling(**WRITING, seed=self.seed)
        answers = _ask(self, "writer", requests, context, sampling) if requests else []
        for (index, gap, row_id), answer in zip(wanted, answers, strict=True):
            found = read_object(answer, [gap])
            if found:
                texts[gap][index] = found[gap]
                context.ledger.add(self.name, row_id, "changed", f"{gap} written")
            else:
                context.ledger.add(self.name, row_id, "flagged", "unreadable answer")
        return _replace(dataset, texts)


@register
@dataclass(frozen=True, kw_only=True)
class QaSynthesis(DataOp):
    """Adds new question-answer pairs, each written in the manner of four complete rows."""

    name: ClassVar[str] = "qa_synthesis"
    roles: ClassVar[tuple[str, ...]] = ("writer",)
    idempotent: ClassVar[bool] = False
    count: int = 2000
    max_rows: int = 1000
    """Larger sets are left as they are, as in the release; 0: no limit."""
    seed: int = 0

    def prompts(self) -> tuple[str, ...]:
        """All templates."""
        return all_prompts()

    def columns(self) -> tuple[str, ...]:
        """Question and answer."""
        return QUESTION, ANSWER

    def apply(self, dataset: Dataset, context: OpContext) -> Dataset:
        """Ask for ``count`` pairs; unreadable answers are skipped."""
        pairs = _complete(dataset)
        if not pairs or not self.count or (self.max_rows and len(dataset) > self.max_rows):
            return dataset
        requests = [
            fill("pair", {"examples": _examples(pairs, f"{self.seed}/{index}")})
            for index in range(self.count)
        ]
        answers = _ask(self, "writer", requests, context, Sampling(**WRITING, seed=self.seed))
        found = [read_object(answer, [QUESTION, ANSWER]) for answer in answers]
        parents = digest(*dataset[ROW_ID])[:12]
        rows = {name: list(dataset[name]) for name in dataset.column_names}
        for index, pair in enumerate(found):
            if pair is None:
                continue
            row_id = f"new-{parents}-{self.seed}-{index}"
            context.ledger.add(self.name, row_id, "added")
            blank = {DIRTY: False, ROW_ID: row_id} | pair
            for name, values in rows.items():
                values.append(blank.get(name, [] if name == "history" else None))
        return Dataset.from_dict(rows, features=dataset.features)


@register
@dataclass(frozen=True, kw_only=True)
class QaOptimizeMapper(DataOp):
    """Rewrites the question, then the answer given the new question; rows that screening found clean pass
    byte for byte, and so does a text whose new form cannot be read or changes its length by more than 10 %.
    """

    name: ClassVar[str] = "qa_optimize_mapper"
    roles: ClassVar[tuple[str, ...]] = ("optimizer",)
    idempotent: ClassVar[bool] = False
    tolerance: float = 0.1
    seed: int = 0

    def prompts(self) -> tuple[str, ...]:
        """All templates."""
        return all_prompts()

    def columns(self) -> tuple[str, ...]:
        """Question and answer."""
        return QUESTION, ANSWER

    def apply(self, dataset: Dataset, context: OpContext) -> Dataset:
        """Rewrite dirty rows: one question and one answer each, missing ones left alone."""
        dirty = dataset[DIRTY] if DIRTY in dataset.column_names else [True] * len(dataset)
        texts = {QUESTION: list(dataset[QUESTION]), ANSWER: list(dataset[ANSWER])}
        ids = list(dataset[ROW_ID])
        sampling = Sampling(**WRITING, seed=self.seed)
        for name, prompt in ((QUESTION, "better_question"), (ANSWER, "better_answer")):
            rows = [index for index, flag in enumerate(dirty) if flag and texts[name][index].strip()]
            requests = [
                fill(prompt, {key: texts[key][index] for key in (QUESTION, ANSWER)}) for index in rows
            ]
            answers = _ask(self, "optimizer", requests, context, sampling) if requests else []
            for index, answer in zip(rows, answers, strict=True):
                found = read_object(answer, [name])
                if found is None:
                    context.ledger.add(self.name, ids[index], "flagged", f"{name}: unreadable answer")
                elif not near_length(found[name], texts[name][index], self.tolerance):
                    context.ledger.add(self.name, ids[index], "flagged", f"{name}: length changed too much")
                elif found[name] != texts[name][index]:
                    texts[name][index] = found[name]
                    context.ledger.add(self.name, ids[index], "changed", f"{name} rewritten")
        return _replace(dataset, texts)


@register
@dataclass(frozen=True, kw_only=True)
class DeitaSelector(DataOp):
    """Keeps a share of rows by complexity x quality, scored by a language model, and diversity of texts."""

    name: ClassVar[str] = "deita_selector"
    roles: ClassVar[tuple[str, ...]] = ("scorer",)
    idempotent: ClassVar[bool] = False
    ratio: float = 0.5
    max_cosine: float = 0.9

    def prompts(self) -> tuple[str, ...]:
        """All templates."""
        return all_prompts()

    def columns(self) -> tuple[str, ...]:
        """Question and answer."""
        return QUESTION, ANSWER

    def apply(self, dataset: Dataset, context: OpContext) -> Dataset:
        """Score, select, record the rest as dropped."""
        from hf_plugins.autodp.features import hash_embed

        pairs = list(zip(dataset[QUESTION], dataset[ANSWER], strict=True))
        values = [{QUESTION: q, ANSWER: a} for q, a in pairs]
        scores = {}
        for name in ("complexity", "quality"):
            requests = [fill(name, value) for value in values]
            answers = _ask(self, "scorer", requests, context, Sampling(max_tokens=8))
            # A reply without a number counts as the lowest grade.
            scores[name] = [read_grade(answer) or 1.0 for answer in answers]
        count = len(keep_best(scores["quality"], self.ratio))
        embedded = hash_embed([f"{q}\n{a}" for q, a in pairs])
        kept = set(
            deita_select(
                scores["complexity"], scores["quality"], embedded, count, max_cosine=self.max_cosine
            ).tolist()
        )
        for index, row_id in enumerate(dataset[ROW_ID]):
            if index not in kept:
                context.ledger.add(self.name, row_id, "dropped", "not selected")
        return dataset.select(sorted(kept))


def read_grade(text: str) -> float | None:
    """A number from 1 to 6 at the start of a reply."""
    match = re.match(r"\W*([1-6](?:\.\d+)?)(?![\d])", text.rsplit("</think>", 1)[-1])
    return min(float(match.group(1)), 6.0) if match else None


def teacher_labels(
    client: ChatClient, rows: Dataset, numbers: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Labels of some rows by a language model: 1 needs rewriting, 0 does not.

    Returns:
        The row numbers with a readable label, and the labels.
    """
    requests = [fill("screen", {key: rows[int(i)][key] for key in (QUESTION, ANSWER)}) for i in numbers]
    replies = client.complete_many(requests, sampling=Sampling(max_tokens=8))
    words = [re.sub(r"\W", "", reply[0].rsplit("</think>", 1)[-1]).lower() for reply in replies]
    labels = [{"yes": 1, "no": 0, "是": 1, "否": 0}.get(word) for word in words]
    known = [index for index, label in enumerate(labels) if label is not None]
    return np.array([numbers[i] for i in known], int), np.array([labels[i] for i in known], int)


def is_local(spec: Mapping[str, Any]) -> bool:
    """Whether a client's model runs on this machine: a folder, or a server on the loopback address."""
    if spec.get("kind") != "openai":
        return True
    host = urlsplit(str(spec.get("base_url", ""))).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def data_clients(
    specs: Mapping[str, Mapping[str, Any] | ChatClient],
    *,
    cache: Path | None,
    remote_data: str,
) -> dict[str, ChatClient]:
    """Clients that may see rows, by role.

    Args:
        specs: Entries of a recipe, or clients.
        cache: File that keeps every answer, so that an equal row is asked about once; None keeps none.
        remote_data: The user's words, see `CONSENT`.

    Raises:
        ValueError: If a client's model is elsewhere and the user has not said that rows may go there.
    """
    found: dict[str, ChatClient] = {}
    for role, spec in specs.items():
        if isinstance(spec, ChatClient):
            from hf_plugins.data_ops.chat import CachedChat

            found[role] = CachedChat(spec, cache) if cache else spec
            continue
        if not is_local(spec) and remote_data != CONSENT:
            raise ValueError(
                f"the client of {role!r} is at {spec.get('base_url')}, and rows would be sent there; use "
                f"a model on this machine, or allow it with remote_data: {CONSENT!r}."
            )
        found[role] = make_client(spec, cache=cache)
    return found
