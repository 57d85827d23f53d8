"""Operators that keep or drop a row by a figure of its text; names and parameters are Data-Juicer's."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from datasets import Dataset

from hf_plugins.data_ops.op import DataOp, OpContext, register, row_texts, select_rows
from hf_plugins.data_ops.text import TOKENIZATIONS, repetition_ratio, special_characters_ratio, tokens


@dataclass(frozen=True, kw_only=True)
class RangeFilter(DataOp):
    """Keeps rows whose figure lies in [low, high]; a subclass says what is measured and the bounds."""

    text_key: str | tuple[str, ...] = "text"
    """Column, or columns read as one text; chat messages and turns are read too."""
    what: ClassVar[str] = ""

    def bounds(self) -> tuple[float, float]:
        """Lowest and highest figure that stays."""
        raise NotImplementedError(f"{type(self).__name__} must write bounds().")

    def measure(self, texts: Sequence[str]) -> list[float]:
        """The figure of each text."""
        raise NotImplementedError(f"{type(self).__name__} must write measure(texts).")

    def __post_init__(self) -> None:
        low, high = self.bounds()
        if not low <= high:
            raise ValueError(
                f"{self.name}: the lower bound {low:g} exceeds the upper bound {high:g}; swap them."
            )

    def apply(self, dataset: Dataset, context: OpContext) -> Dataset:
        """Measure all rows, keep those within bounds."""
        keys = [self.text_key] if isinstance(self.text_key, str) else list(self.text_key)

        def measured(batch: dict[str, list[Any]]) -> dict[str, list[float]]:
            return {"_value": self.measure(row_texts(batch, self.text_key))}

        values = (
            dataset.select_columns(keys)
            .map(
                measured,
                batched=True,
                num_proc=_processes(len(dataset), context),
                remove_columns=keys,
                desc=self.name,
            )
            .with_format(None)["_value"]
            if len(dataset)
            else []
        )
        low, high = self.bounds()
        reasons = [
            None
            if low <= value <= high
            else f"{self.what} {value:.4g} {'<' if value < low else '>'} {low if value < low else high:.4g}"
            for value in values
        ]
        return select_rows(dataset, reasons, context, self.name, list(values))


def _processes(num_rows: int, context: OpContext) -> int | None:
    # A process costs more than a few hundred rows of string work.
    return context.num_proc if context.num_proc and num_rows >= 1000 * context.num_proc else None


@register
@dataclass(frozen=True, kw_only=True)
class CharacterRepetitionFilter(RangeFilter):
    """Drops texts in which the same runs of characters return.

    Departure from Data-Juicer: the ratio counts all n-grams that occur more than once (its own counts the
    most frequent ones only).
    """

    name: ClassVar[str] = "character_repetition_filter"
    what: ClassVar[str] = "character repetition"
    rep_len: int = 10
    min_ratio: float = 0.0
    max_ratio: float = 0.5

    def bounds(self) -> tuple[float, float]:
        """Allowed ratios."""
        return self.min_ratio, self.max_ratio

    def measure(self, texts: Sequence[str]) -> list[float]:
        """R_n over characters."""
        return [repetition_ratio(text, self.rep_len) for text in texts]


@register
@dataclass(frozen=True, kw_only=True)
class WordRepetitionFilter(RangeFilter):
    """Drops texts in which the same runs of words return; a word of Chinese is one character."""

    name: ClassVar[str] = "word_repetition_filter"
    what: ClassVar[str] = "word repetition"
    rep_len: int = 10
    min_ratio: float = 0.0
    max_ratio: float = 0.5

    def bounds(self) -> tuple[float, float]:
        """Allowed ratios."""
        return self.min_ratio, self.max_ratio

    def measure(self, texts: Sequence[str]) -> list[float]:
        """R_n over words."""
        return [repetition_ratio(tokens(text), self.rep_len) for text in texts]


@register
@dataclass(frozen=True, kw_only=True)
class SpecialCharactersFilter(RangeFilter):
    """Drops texts with too large a share of characters that are no letters."""

    name: ClassVar[str] = "special_characters_filter"
    what: ClassVar[str] = "special characters"
    min_ratio: float = 0.0
    max_ratio: float = 0.25

    def bounds(self) -> tuple[float, float]:
        """Allowed shares."""
        return self.min_ratio, self.max_ratio

    def measure(self, texts: Sequence[str]) -> list[float]:
        """Share of non-letters."""
        return [special_characters_ratio(text) for text in texts]


@register
@dataclass(frozen=True, kw_only=True)
class TextLengthFilter(RangeFilter):
    """Drops texts that are too short or too long in characters; run it first against monster rows."""

    name: ClassVar[str] = "text_length_filter"
    what: ClassVar[str] = "characters"
    min_len: int = 10
    max_len: int = sys.maxsize

    def bounds(self) -> tuple[float, float]:
        """Allowed lengths."""
        return self.min_len, self.max_len

    def measure(self, texts: Sequence[str]) -> list[float]:
        """Number of characters."""
        return [float(len(text)) for text in texts]


@register
@dataclass(frozen=True, kw_only=True)
class WordsNumFilter(RangeFilter):
    """Drops texts with too few or too many words; a word of Chinese is one character."""

    name: ClassVar[str] = "words_num_filter"
    what: ClassVar[str] = "words"
    tokenization: str = "words"
    min_num: int = 10
    max_num: int = sys.maxsize

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenization not in TOKENIZATIONS:
            raise ValueError(
                f"{self.name}: tokenization must be one of {', '.join(TOKENIZATIONS)}; got "
                f"{self.tokenization!r}."
            )

    def bounds(self) -> tuple[float, float]:
        """Allowed numbers."""
        return self.min_num, self.max_num

    def measure(self, texts: Sequence[str]) -> list[float]:
        """Number of words."""
        return [float(len(tokens(text, self.tokenization))) for text in texts]


@cache
def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@register
@dataclass(frozen=True, kw_only=True)
class TokenNumFilter(RangeFilter):
    """Drops texts with too few or too many tokens of a Hugging Face tokenizer."""

    name: ClassVar[str] = "token_num_filter"
    what: ClassVar[str] = "tokens"
    hf_tokenizer: str
    """Folder (or cached name) of the tokenizer; there is no default, a count means nothing without it."""
    min_num: int = 10
    max_num: int = sys.maxsize

    def bounds(self) -> tuple[float, float]:
        """Allowed numbers."""
        return self.min_num, self.max_num

    def measure(self, texts: Sequence[str]) -> list[float]:
        """Number of tokens, special ones not counted."""
        encoded = _tokenizer(self.hf_tokenizer)(list(texts), add_special_tokens=False)["input_ids"]
        return [float(len(ids)) for ids in encoded]
