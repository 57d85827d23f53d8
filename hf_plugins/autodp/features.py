"""Texts as numbers without a model: signed hashing of character n-grams, and a few cheap quality features.

Characters, not words: Chinese has no spaces, and a whole text must not become one token.
"""

# n texts, d buckets.

import unicodedata
from collections.abc import Sequence

import numpy as np

_PRIME = np.uint64(1099511628211)
_OFFSET = np.uint64(14695981039346656037)


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)


def window_hashes(text: str, length: int) -> np.ndarray:
    """A 64-bit hash of every window of ``length`` characters, in order; empty for a shorter text."""
    codes = _codes(text)
    count = len(codes) - length + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    found = np.full(count, _OFFSET)
    with np.errstate(over="ignore"):
        for shift in range(length):
            found = (found ^ codes[shift : shift + count]) * _PRIME
        # The low bits of such a product mix badly; fold the high ones in.
        return found ^ (found >> np.uint64(29))


def hash_embed(texts: Sequence[str], *, dim: int = 256, ngrams: tuple[int, ...] = (1, 2, 3)) -> np.ndarray:
    """Signed counts of hashed character n-grams, square-rooted, rows of length 1.

    Args:
        texts: Any language; case and width of characters are folded.
        dim: Buckets d.
        ngrams: Lengths of the n-grams.

    Returns:
        (n, d) float32; a text without characters gives a zero row.
    """
    out = np.zeros((len(texts), dim), np.float32)
    for row, text in enumerate(texts):
        folded = unicodedata.normalize("NFKC", text).lower()
        for length in ngrams:
            hashes = window_hashes(folded, length)
            sign = np.where((hashes >> np.uint64(40)) & np.uint64(1), 1.0, -1.0)
            out[row] += np.bincount((hashes % np.uint64(dim)).astype(int), sign, minlength=dim)
        out[row] = np.sign(out[row]) * np.sqrt(np.abs(out[row]))
    norm = np.linalg.norm(out, axis=1, keepdims=True)
    return out / np.where(norm > 0, norm, 1)


def repetition_ratio(text: str, length: int = 2) -> float:
    """Share of character n-grams that occurred before in the text, in [0, 1)."""
    hashes = window_hashes(text, length)
    return 1 - len(np.unique(hashes)) / len(hashes) if len(hashes) else 0.0


def special_ratio(text: str) -> float:
    """Share of characters that are neither letters, digits, blanks nor common punctuation, in [0, 1]."""
    odd = sum(unicodedata.category(char)[0] in "SC" and char not in "\n\t" for char in text)
    return odd / len(text) if text else 0.0


def quality_features(questions: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """Cheap features of question-answer pairs.

    Returns:
        (n, 7): log lengths, repetition and special-character ratios of both, whether one is missing.
    """
    rows = [
        (
            np.log1p(len(q)),
            np.log1p(len(a)),
            repetition_ratio(q),
            repetition_ratio(a),
            special_ratio(q),
            special_ratio(a),
            float(not q.strip() or not a.strip()),
        )
        for q, a in zip(questions, answers, strict=True)
    ]
    return np.array(rows, float).reshape(len(rows), 7)
