"""Near-duplicates by MinHash: signatures by rensa, candidates by bands, each checked exactly."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import ClassVar, Literal

import numpy as np
from datasets import Dataset

from hf_plugins.data_ops.op import ROW_ID, DataOp, OpContext, digest, register, row_texts, select_rows
from hf_plugins.data_ops.text import TOKENIZATIONS, tokens

_CHUNK = 2000
# Shingle sets of candidates that are kept for the next comparison.
_CACHED = 4096


def shingles(
    text: str, *, tokenization: str = "character", window_size: int = 3, lowercase: bool = True
) -> frozenset[str]:
    """Set of runs of ``window_size`` tokens; a shorter text is one shingle, an empty one has none."""
    items = tokens(text.lower() if lowercase else text, tokenization)
    if not items:
        return frozenset()
    glue = "" if tokenization == "character" else " "
    starts = range(max(1, len(items) - window_size + 1))
    return frozenset(glue.join(items[start : start + window_size]) for start in starts)


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """``|a and b| / |a or b|``; 0 if both are empty."""
    both = len(a & b)
    union = len(a) + len(b) - both
    return both / union if union else 0.0


@cache
def bands_for(threshold: float, num_permutations: int, recall: float = 0.999) -> tuple[int, int]:
    """Bands b and rows r, b * r <= permutations, that propose a pair at the threshold with this recall.

    A pair of Jaccard s shares a band with probability ``1 - (1 - s^r)^b``. Candidates are checked exactly, so
    false ones cost time and missed ones are lost: r is the largest that keeps the recall (else 1).
    """
    for rows in range(num_permutations, 1, -1):
        bands = num_permutations // rows
        if 1 - (1 - threshold**rows) ** bands >= recall:
            return bands, rows
    return num_permutations, 1


def signatures(sets: Sequence[frozenset[str]], *, num_permutations: int = 128, seed: int = 0) -> np.ndarray:
    """MinHash signatures, uint32 (texts, permutations).

    Raises:
        ImportError: If rensa is not installed.
    """
    try:
        from rensa import RMinHash
    except ImportError as error:
        raise ImportError(
            'MinHash needs rensa; install the extra: pip install "mmhf-plugins[data]".'
        ) from error
    # Sorted, so that a signature does not depend on the order of a set.
    matrix = RMinHash.digest_matrix_from_token_sets([sorted(s) for s in sets], num_permutations, seed)
    return np.asarray(matrix.to_rows(), dtype=np.uint32).reshape(len(sets), num_permutations)


class BandIndex:
    """Rows by the bands of their signatures.

    Args:
        bands: Number of bands b.
        rows: Rows r of a signature in each.
    """

    def __init__(self, bands: int, rows: int) -> None:
        self.bands, self.rows = bands, rows
        # Odd, so that multiplication modulo 2^64 loses nothing.
        draw = np.random.default_rng(0).integers(0, 2**63, rows, dtype=np.uint64)
        self._factors = 2 * draw + np.uint64(1)
        # Most keys belong to one row, which needs no list.
        self._first: list[dict[int, int]] = [{} for _ in range(bands)]
        self._more: list[dict[int, list[int]]] = [{} for _ in range(bands)]

    def keys(self, signatures: np.ndarray) -> list[list[int]]:
        """One number a band for each signature (uint32, texts x permutations), the same in every process.

        Two bands that collide cost a comparison, never a row.
        """
        parts = signatures[:, : self.bands * self.rows].reshape(len(signatures), self.bands, self.rows)
        with np.errstate(over="ignore"):
            return (parts.astype(np.uint64) * self._factors).sum(-1, dtype=np.uint64).tolist()

    def near(self, keys: Sequence[int]) -> list[int]:
        """Rows that share a band, in order."""
        found = set()
        for key, first, more in zip(keys, self._first, self._more, strict=True):
            if key in first:
                found.add(first[key])
                found.update(more.get(key, ()))
        return sorted(found)

    def add(self, row: int, keys: Sequence[int]) -> None:
        """Take a row in."""
        for key, first, more in zip(keys, self._first, self._more, strict=True):
            if first.setdefault(key, row) != row:
                more.setdefault(key, []).append(row)


@register
@dataclass(frozen=True, kw_only=True)
class DocumentMinhashDeduplicator(DataOp):
    """Drops a row whose text is a near-duplicate of an earlier one that stays.

    ``jaccard_threshold`` holds exactly: bands only propose candidates, which are then compared by their true
    Jaccard, and only with rows that stay (no chains of ever less similar texts).
    Departures from Data-Juicer's defaults: characters in windows of 3, 128 permutations, threshold 0.8, the
    paper's; its own default splits at blanks, which makes one token of a Chinese sentence.
    """

    name: ClassVar[str] = "document_minhash_deduplicator"
    text_key: str | tuple[str, ...] = "text"
    tokenization: Literal["character", "space", "punctuation", "words"] = "character"
    window_size: int = 3
    lowercase: bool = True
    num_permutations: int = 128
    jaccard_threshold: float = 0.8
    num_bands: int | None = None
    num_rows_per_band: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = []
        if self.tokenization not in TOKENIZATIONS:
            wrong.append(f"tokenization must be one of {', '.join(TOKENIZATIONS)}; got {self.tokenization!r}")
        if self.window_size < 1 or self.num_permutations < 1:
            wrong.append("window_size and num_permutations must be >= 1")
        if not 0 < self.jaccard_threshold <= 1:
            wrong.append(f"jaccard_threshold must lie in (0, 1]; got {self.jaccard_threshold}: it is a share")
        if (self.num_bands is None) != (self.num_rows_per_band is None):
            wrong.append("give num_bands and num_rows_per_band together, or neither")
        elif self.num_bands and self.num_bands * (self.num_rows_per_band or 0) > self.num_permutations:
            wrong.append("num_bands * num_rows_per_band exceeds num_permutations")
        if wrong:
            raise ValueError(f"{self.name}: " + "; ".join(wrong) + ".")

    def _shingles(self, text: str) -> frozenset[str]:
        return shingles(
            text, tokenization=self.tokenization, window_size=self.window_size, lowercase=self.lowercase
        )

    def apply(self, dataset: Dataset, context: OpContext) -> Dataset:
        """Keep the first of near-equal rows."""
        bands, rows = (
            (self.num_bands, self.num_rows_per_band)
            if self.num_bands and self.num_rows_per_band
            else bands_for(self.jaccard_threshold, self.num_permutations)
        )
        index = BandIndex(bands, rows)
        ids = list(dataset[ROW_ID])

        @lru_cache(maxsize=_CACHED)
        def shingles_of(row: int) -> frozenset[str]:
            # Made again for the few rows that are candidates: kept for all they are most of the memory.
            return self._shingles(row_texts(dataset[row : row + 1], self.text_key)[0])

        reasons: list[str | None] = []
        values: list[float | None] = []
        for start in range(0, len(dataset), _CHUNK):
            sets = [
                self._shingles(text) for text in row_texts(dataset[start : start + _CHUNK], self.text_key)
            ]
            keys = index.keys(signatures(sets, num_permutations=self.num_permutations, seed=self.seed))
            for offset, (mine, mine_keys) in enumerate(zip(sets, keys, strict=True)):
                twin, similar = max(
                    ((other, jaccard(mine, shingles_of(other))) for other in index.near(mine_keys)),
                    key=lambda found: found[1],
                    default=(-1, 0.0),
                )
                if mine and similar >= self.jaccard_threshold:
                    reasons.append(f"near-duplicate of {ids[twin]}")
                    values.append(similar)
                    continue
                reasons.append(None)
                values.append(None)
                if mine:
                    index.add(start + offset, mine_keys)
            if context.progress:
                context.progress(self.name, min(start + _CHUNK, len(dataset)), len(dataset))
        return select_rows(dataset, reasons, context, self.name, values)


@register
@dataclass(frozen=True, kw_only=True)
class DocumentDeduplicator(DataOp):
    """Drops exact repetitions of a text."""

    name: ClassVar[str] = "document_deduplicator"
    text_key: str | tuple[str, ...] = "text"
    lowercase: bool = False
    ignore_non_character: bool = False

    def apply(self, dataset: Dataset, context: OpContext) -> Dataset:
        """Keep the first of equal rows."""
        ids = list(dataset[ROW_ID])
        first: dict[str, int] = {}
        reasons: list[str | None] = []
        for start in range(0, len(dataset), _CHUNK):
            for text in row_texts(dataset[start : start + _CHUNK], self.text_key):
                text = text.lower() if self.lowercase else text
                if self.ignore_non_character:
                    text = "".join(character for character in text if character.isalpha())
                twin = first.setdefault(digest(text), len(reasons))
                reasons.append(None if twin == len(reasons) else f"equal to {ids[twin]}")
        return select_rows(dataset, reasons, context, self.name)
