"""Operators that ask a language model: score, optimise, write new rows."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from datasets import Dataset, Value, concatenate_datasets

from hf_plugins.data_ops.answers import Answer, AnswerSchema, ask
from hf_plugins.data_ops.chat import Messages, Sampling
from hf_plugins.data_ops.op import ROW_ID, DataOp, OpContext, digest, register, row_texts, select_rows
from hf_plugins.data_ops.prompts import (
    HEADER,
    OPTIMIZE,
    QA,
    SCORE,
    check_lang,
    optimize_messages,
    qa_messages,
    score_messages,
    templates,
    write_messages,
)
from hf_plugins.data_ops.text import join_text

# Rows asked about together: enough to keep a server busy, few enough that progress is seen.
CHUNK = 512


def ask_chunks(
    op: DataOp,
    context: OpContext,
    role: str,
    conversations: Sequence[Messages],
    schema: AnswerSchema,
    sampling: Sampling,
) -> Iterator[Answer]:
    """Checked answers in order, asked for in chunks with progress."""
    client = context.client(role)
    for start in range(0, len(conversations), CHUNK):
        yield from ask(client, conversations[start : start + CHUNK], schema, sampling=sampling)
        if context.progress:
            context.progress(op.name, min(start + CHUNK, len(conversations)), len(conversations))


def set_column(dataset: Dataset, name: str, values: Sequence[Any], kind: Value | None = None) -> Dataset:
    """The data set with a column set or replaced."""
    if name in dataset.column_names:
        dataset = dataset.remove_columns(name)
    return dataset.add_column(name, list(values), feature=kind)


@register
@dataclass(frozen=True, kw_only=True)
class LlmQualityScoreFilter(DataOp):
    """Keeps rows that a language model gives a high score.

    The model scores 1 to 10; the column ``llm_quality_score`` holds a tenth of it, as Data-Juicer's lies in
    [0, 1], and ``llm_quality_reason`` the reason. The paper's threshold 9 is ``min_score=0.9``.
    """

    name: ClassVar[str] = "llm_quality_score_filter"
    roles: ClassVar[tuple[str, ...]] = ("scorer",)
    input_keys: tuple[str, ...] = ("question", "answer")
    field_names: tuple[str, ...] = ("Question", "Answer")
    min_score: float = 0.9
    max_score: float = 1.0
    on_unparsed: Literal["drop", "keep"] = "drop"
    """What happens to a row whose answer stays unusable; a kept one has no score."""
    lang: Literal["zh", "en"] = "zh"

    def __post_init__(self) -> None:
        check_lang(self.name, self.lang)
        if not 0 <= self.min_score <= self.max_score <= 1:
            raise ValueError(
                f"{self.name}: min_score and max_score must lie in [0, 1]; got {self.min_score:g} and "
                f"{self.max_score:g}. Write 0.9 for 9 of 10."
            )
        if len(self.input_keys) != len(self.field_names):
            raise ValueError(f"{self.name}: give one of field_names for each of input_keys.")
        if self.on_unparsed not in ("drop", "keep"):
            raise ValueError(f"{self.name}: on_unparsed must be drop or keep; got {self.on_unparsed!r}.")

    def columns(self) -> tuple[str, ...]:
        """Columns that are scored."""
        return self.input_keys

    def prompts(self) -> tuple[str, ...]:
        """Words of the scorer's prompt."""
        return templates("score")

    def score(self, rows: Sequence[Sequence[str]], context: OpContext) -> list[Answer]:
        """Answers of the scorer for texts in the order of ``input_keys``."""
        asked = [score_messages(list(zip(self.field_names, row, strict=True)), self.lang) for row in rows]
        return list(ask_chunks(self, context, "scorer", asked, SCORE, Sampling(max_tokens=512)))

    def apply(self, dataset: Dataset, context: OpContext) -> Dataset:
        """Score all rows, keep the good ones."""
        texts = [
            [join_text(row[key]) for key in self.input_keys]
            for row in dataset.select_columns(list(self.input_keys))
        ]
        answers = self.score(texts, context)
        scores = [None if a.value is None else a.value["score"] / 10 for a in answers]
        reasons: list[str | None] = []
        for row_id, answer, score in zip(list(dataset[ROW_ID]), answers, scores, strict=True):
            if score is None and self.on_unparsed == "keep":
                context.ledger.add(self.name, row_id, "flagged", f"unparsed: {answer.problem[:200]}")
                reasons.append(None)
            elif score is None:
                reasons.append(f"unparsed: {answer.problem[:200]}")
            else:
                inside = self.min_score <= score <= self.max_score
                reasons.append(
                    None if inside else f"score {score:g} outside [{self.min_score:g}, {self.max_score:g}]"
                )
        dataset = set_column(dataset, "llm_quality_score", scores, Value("float64"))
        told = [None if a.value is None else a.value["reason"] for a in answers]
        dataset = set_column(dataset, "llm_quality_reason", told, Value("string"))
        return select_rows(dataset, reasons, context, self.name, scores)


def within(before: str, after: str, tolerance: float) -> bool:
    """Whether a text's length changed by at most a share ``tolerance``; any text may replace an empty one."""
    return not before or (1 - tolerance) * len(before) <= len(after) <= (1 + tolerance) * len(before)


@register
@dataclass(frozen=True, kw_only=True)
class OptimizeQaMapper(DataOp):
    """Lets a language model rewrite pairs that have a defect; a rewrite of another length is not taken.

    ``optimize_scope="survivors"`` asks about every row (the paper's literal order: after scoring);
    ``"band"`` asks only about rows with ``band[0] <= llm_quality_score < band[1]``, scores the rewrite again
    and drops what stays below ``band[1]``.
    """

    name: ClassVar[str] = "optimize_qa_mapper"
    idempotent: ClassVar[bool] = False
    question_key: str = "question"
    answer_key: str = "answer"
    optimize_scope: Literal["survivors", "band"] = "survivors"
    band: tuple[float, float] = (0.6, 0.9)
    length_tolerance: float = 0.3
    lang: Literal["zh", "en"] = "zh"
    roles: ClassVar[tuple[str, ...]] = ("optimizer", "scorer")

    def __post_init__(self) -> None:
        check_lang(self.name, self.lang)
        if self.optimize_scope not in ("survivors", "band"):
            raise ValueError(
                f"{self.name}: optimize_scope must be survivors or band; got {self.optimize_scope!r}."
            )
        if len(self.band) != 2 or not 0 <= self.band[0] < self.band[1] <= 1:
            raise ValueError(f"{self.name}: band must be two rising scores in [0, 1]; got {self.band}.")
        if not self.length_tolerance > 0:
            raise ValueError(
                f"{self.name}: length_tolerance must be > 0; got {self.length_tolerance}. Write 0.3 for 30 %."
            )

    def fingerprint(self, context: OpContext | None = None) -> str:
        """As every operator's; the scorer counts only where it is asked."""
        if self.optimize_scope == "survivors" and context is not None:
            optimizer = context.client("optimizer")
            context = OpContext(clients={"optimizer": optimizer, "default": optimizer})
        return super().fingerprint(context)

    def columns(self) -> tuple[str, ...]:
        """The pair, and the score where the band needs it."""
        score = ("llm_quality_score",) if self.optimize_scope == "band" else ()
        return (self.question_key, self.answer_key, *score)

    def prompts(self) -> tuple[str, ...]:
        """Words of the optimiser's (and scorer's) prompt."""
        return templates("optimize", "score")

    def apply(self, dataset: Dataset, context: OpContext) -> Dataset:
        """Ask, take what keeps the rules, score again in band mode."""
        questions, answers = list(dataset[self.question_key]), list(dataset[self.answer_key])
        ids = list(dataset[ROW_ID])
        todo = list(range(len(ids)))
        if self.optimize_scope == "band":
            scores = list(dataset["llm_quality_score"])
            todo = [i for i in todo if scores[i] is not None and self.band[0] <= scores[i] < self.band[1]]
        asked = [
            optimize_messages(questions[i] or "", answers[i] or "", self.lang, self.length_tolerance)
            for i in todo
        ]
        replies = ask_chunks(self, context, "optimizer", asked, OPTIMIZE, Sampling(max_tokens=2048))
        for index, reply in zip(todo, replies, strict=True):
            if reply.value is None:
                context.ledger.add(self.name, ids[index], "flagged", f"unparsed: {reply.problem[:200]}")
                continue
            if not reply.value["optimize"]:
                continue
            taken = False
            for column, key in ((questions, "question"), (answers, "answer")):
                before, after = column[index] or "", reply.value[key]
                if after is None or after == before:
                    continue
                if not after.strip() or not within(before, after, self.length_tolerance):
                    reason = f"{key} not taken: length {len(before)} -> {len(after)}"
                    context.ledger.add(self.name, ids[index], "flagged", reason)
                    continue
                column[index], taken = after, True
            if taken:
                context.ledger.add(self.name, ids[index], "changed", reply.value["reason"][:200])
        dataset = set_column(dataset, self.question_key, questions, dataset.features[self.question_key])
        dataset = set_column(dataset, self.answer_key, answers, dataset.features[self.answer_key])
        return self._score_again(dataset, todo, context) if self.optimize_scope == "band" else dataset

    def _score_again(self, dataset: Dataset, todo: list[int], context: OpContext) -> Dataset:
        scorer = LlmQualityScoreFilter(input_keys=(self.question_key, self.answer_key), lang=self.lang)
        pairs = dataset.select_columns([self.question_key, self.answer_key])
        texts = [[pairs[i][self.question_key] or "", pairs[i][self.answer_key] or ""] for i in todo]
        scores = list(dataset["llm_quality_score"])
        for index, answer in zip(todo, scorer.score(texts, context), strict=True):
            scores[index] = None if answer.value is None else answer.value["score"] / 10
        dataset = set_column(dataset, "llm_quality_score", scores, Value("float64"))
        reasons = [
            None
            if score is not None and score >= self.band[1]
            else ("unparsed" if score is None else f"score {score:g} < {self.band[1]:g} after optimisation")
            for score in scores
        ]
        return select_rows(dataset, reasons, context, self.name, scores)


def append_rows(dataset: Dataset, rows: Sequence[dict[str, Any]], context: OpContext, op: str) -> Dataset:
    """Rows added at the end, columns that they lack empty; each is recorded as added."""
    if not rows:
        return dataset
    extra = [name for name in rows[0] if name not in dataset.column_names]
    for name in extra:
        dataset = dataset.add_column(name, [None] * len(dataset), feature=Value("string"))
    columns = {name: [row.get(name) for row in rows] for name in dataset.column_names}
    for row in rows:
        context.ledger.add(op, row[ROW_ID], "added", row.get("example_ids", ""))
    return concatenate_datasets([dataset, Dataset.from_dict(columns, features=dataset.features)])


@dataclass(frozen=True, kw_only=True)
class _FromExamples(DataOp):
    """Writes ``num_rows`` new rows, each from ``example_num`` rows drawn with the seed."""

    idempotent: ClassVar[bool] = False
    roles: ClassVar[tuple[str, ...]] = ("writer",)
    num_rows: int
    example_num: int = 3
    seed: int = 0
    temperature: float = 0.7
    top_p: float = 0.8
    max_tokens: int = 1024
    lang: Literal["zh", "en"] = "zh"

    def __post_init__(self) -> None:
        check_lang(self.name, self.lang)
        if self.num_rows < 0 or self.example_num < 1:
            raise ValueError(
                f"{self.name}: num_rows must be >= 0 and example_num >= 1; got {self.num_rows}, "
                f"{self.example_num}."
            )

    def draw(self, dataset: Dataset, usable: list[int]) -> list[list[int]]:
        """Examples of each new row.

        Raises:
            ValueError: If fewer rows can serve as examples than one prompt needs.
        """
        if self.num_rows and len(usable) < self.example_num:
            raise ValueError(
                f"{self.name}: {len(usable)} rows can serve as examples and example_num={self.example_num} "
                "are needed; lower example_num or give more rows."
            )
        generator = random.Random(self.seed)
        return [generator.sample(usable, self.example_num) for _ in range(self.num_rows)]

    def sampling(self, index: int) -> Sampling:
        """Sampling of one new row: its own seed, so that equal examples still give another text."""
        return Sampling(
            temperature=self.temperature, top_p=self.top_p, max_tokens=self.max_tokens, seed=self.seed + index
        )

    def new_id(self, index: int, parents: Sequence[str]) -> str:
        """Id of a new row: hash of operator, seed, place and parents."""
        return digest(self.name, str(self.seed), str(index), *parents)[:20]


@register
@dataclass(frozen=True, kw_only=True)
class GenerateQaFromExamplesMapper(_FromExamples):
    """Adds question-answer pairs written in the manner of existing ones; parents stand in ``example_ids``."""

    name: ClassVar[str] = "generate_qa_from_examples_mapper"
    question_key: str = "question"
    answer_key: str = "answer"

    def columns(self) -> tuple[str, ...]:
        """The pair."""
        return self.question_key, self.answer_key

    def prompts(self) -> tuple[str, ...]:
        """Words of the prompt."""
        return templates("qa")

    def apply(self, dataset: Dataset, context: OpContext) -> Dataset:
        """Draw examples, ask, append."""
        questions, answers = list(dataset[self.question_key]), list(dataset[self.answer_key])
        ids = list(dataset[ROW_ID])
        drawn = self.draw(dataset, [i for i in range(len(ids)) if questions[i] and answers[i]])
        rows = []
        for index, chosen in enumerate(drawn):
            messages = qa_messages([(questions[i], answers[i]) for i in chosen], self.lang)
            (reply,) = ask(context.client("writer"), [messages], QA, sampling=self.sampling(index))
            new = self.new_id(index, [ids[i] for i in chosen])
            if reply.value is None or not (reply.value["question"].strip() and reply.value["answer"].strip()):
                context.ledger.add(
                    self.name, new, "flagged", f"unparsed: {reply.problem[:200] or 'empty text'}"
                )
                continue
            rows.append(
                {
                    self.question_key: reply.value["question"],
                    self.answer_key: reply.value["answer"],
                    ROW_ID: new,
                    "example_ids": ",".join(ids[i] for i in chosen),
                }
            )
            if context.progress:
                context.progress(self.name, index + 1, len(drawn))
        return append_rows(dataset, rows, context, self.name)


@register
@dataclass(frozen=True, kw_only=True)
class GenerateTextFromExamplesMapper(_FromExamples):
    """Adds textbook passages written in the manner of existing texts (the paper's CPT augmentation)."""

    name: ClassVar[str] = "generate_text_from_examples_mapper"
    text_key: str = "text"

    def prompts(self) -> tuple[str, ...]:
        """Words of the prompt."""
        return templates("write")

    def apply(self, dataset: Dataset, context: OpContext) -> Dataset:
        """Draw examples, ask, append what stands under the header."""
        texts = row_texts(dataset[:], self.text_key) if len(dataset) else []
        ids = list(dataset[ROW_ID])
        drawn = self.draw(dataset, [i for i, text in enumerate(texts) if text])
        rows = []
        for index, chosen in enumerate(drawn):
            messages = write_messages([texts[i] for i in chosen], self.lang)
            (reply,) = context.client("writer").complete(messages, sampling=self.sampling(index))
            head, found, body = reply.rpartition("</think>")[2].strip().partition("\n")
            new = self.new_id(index, [ids[i] for i in chosen])
            if head.strip() != HEADER[self.lang] or not body.strip():
                context.ledger.add(self.name, new, "flagged", "unparsed: no passage under the header")
                continue
            parents = ",".join(ids[i] for i in chosen)
            rows.append({self.text_key: body.strip(), ROW_ID: new, "example_ids": parents})
            if context.progress:
                context.progress(self.name, index + 1, len(drawn))
        return append_rows(dataset, rows, context, self.name)
