"""Drop training rows that share long runs of words with an evaluation set."""

import gzip
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset

from hf_plugins.data_ops.op import DataOp, OpContext, register, row_texts, select_rows
from hf_plugins.data_ops.text import join_text, plain_words


def word_ngrams(text: str, length: int) -> set[str]:
    """Runs of ``length`` words without case, width and punctuation; a shorter text is one run."""
    words = plain_words(text)
    if not words:
        return set()
    return {" ".join(words[i : i + length]) for i in range(max(1, len(words) - length + 1))}


@register
@dataclass(frozen=True, kw_only=True)
class DecontaminationFilter(DataOp):
    """Drops rows that share an n-gram of words with an evaluation set; n = 13 as usual in the field.

    Evaluation texts shorter than n words count when a row holds them whole, down to ``min_words`` words.
    """

    name: ClassVar[str] = "ngram_decontamination_filter"
    text_key: str | tuple[str, ...] = "text"
    eval_files: tuple[str, ...]
    """JSON-lines files (also ``.gz``) of the evaluation sets."""
    eval_keys: tuple[str, ...] = ("text",)
    """Columns of those files that are compared, each by itself."""
    ngram: int = 13
    min_words: int = 8

    def __post_init__(self) -> None:
        if not self.eval_files:
            raise ValueError(f"{self.name}: eval_files is empty; name the evaluation sets to keep out.")
        if not 1 <= self.min_words <= self.ngram:
            raise ValueError(
                f"{self.name}: min_words must lie in [1, ngram={self.ngram}]; got {self.min_words}."
            )

    def materials(self) -> tuple[str, ...]:
        """Hashes of the evaluation files."""
        return tuple(hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in self.eval_files)

    def _index(self) -> tuple[dict[str, str], dict[int, dict[str, str]]]:
        whole: dict[str, str] = {}
        short: dict[int, dict[str, str]] = {}
        for path in self.eval_files:
            used = 0
            for row in _rows(Path(path)):
                for key in self.eval_keys:
                    text = join_text(row.get(key))
                    used += bool(text)
                    count = len(plain_words(text))
                    if count >= self.ngram:
                        whole.update(dict.fromkeys(word_ngrams(text, self.ngram), Path(path).name))
                    elif count >= self.min_words:
                        short.setdefault(count, {})[" ".join(plain_words(text))] = Path(path).name
            if not used:
                raise ValueError(
                    f"{self.name}: {path} has no text under {', '.join(self.eval_keys)}; set eval_keys to "
                    "its columns."
                )
        return whole, short

    def apply(self, dataset: Dataset, context: OpContext) -> Dataset:
        """Keep rows that share nothing."""
        whole, short = self._index()
        reasons: list[str | None] = []
        for start in range(0, len(dataset), 2000):
            for text in row_texts(dataset[start : start + 2000], self.text_key):
                hit = next((whole[g] for g in word_ngrams(text, self.ngram) if g in whole), None)
                for count, texts in short.items():
                    hit = hit or next((texts[g] for g in word_ngrams(text, count) if g in texts), None)
                reasons.append(hit and f"shares {self.ngram} words with {hit}")
        return select_rows(dataset, reasons, context, self.name)


def _rows(path: Path) -> list[dict[str, Any]]:
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
    with opened as file:
        return [json.loads(line) for line in file if line.strip()]
