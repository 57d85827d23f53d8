"""Index of token n-grams of private answers: which token would complete one, and whose it is."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple


class Gram(NamedTuple):
    """One n-gram as the index keeps it."""

    tail: bytes
    """Keyed hash of its first n - 1 tokens."""
    token: int
    """Its last token."""


class AnswerGrams:
    """The n-grams of private answers under keyed hashes.

    For each run of n - 1 tokens it holds the tokens that complete a stored n-gram and the samples they come
    from, so that a decoder can rule them out before it draws. Without the secret the index does not spell an
    answer.

    Args:
        length: n; a shorter answer is one gram of its own length and cannot be blocked.
        secret: Key of the hashes.

    Source: MemFree decoding, arXiv 2210.17546, which also shows what verbatim blocking cannot do.
    """

    def __init__(self, length: int = 10, *, secret: bytes = b"") -> None:
        if length < 2:
            raise ValueError(f"n-grams need a length of 2 or more; got {length}. 10 is usual.")
        self.length = length
        self._secret = secret[:64]
        self._next: dict[bytes, dict[int, set[str]]] = {}
        self.sizes: dict[str, int] = {}
        """Number of distinct n-grams of each sample."""

    def _hash(self, tokens: Sequence[int]) -> bytes:
        data = b"".join(int(token).to_bytes(8, "big", signed=True) for token in tokens)
        return hashlib.blake2b(data, digest_size=16, key=self._secret).digest()

    def grams(self, answer: Sequence[int]) -> list[Gram]:
        """The distinct n-grams of an answer, in order."""
        found = [
            Gram(self._hash(answer[start : start + self.length - 1]), int(answer[start + self.length - 1]))
            for start in range(len(answer) - self.length + 1)
        ]
        return list(dict.fromkeys(found))

    def add(self, sample: str, grams: Sequence[Gram]) -> None:
        """Store the n-grams of one sample."""
        self.sizes[sample] = len(grams)
        for gram in grams:
            self._next.setdefault(gram.tail, {}).setdefault(gram.token, set()).add(sample)

    def remove(self, samples: Sequence[str]) -> None:
        """Take samples out; n-grams that another sample holds too stay."""
        gone = {sample for sample in samples if self.sizes.pop(sample, None) is not None}
        for tail in list(self._next) if gone else ():
            tokens = self._next[tail]
            for token in list(tokens):
                tokens[token] -= gone
                if not tokens[token]:
                    del tokens[token]
            if not tokens:
                del self._next[tail]

    def completions(self, tokens: Sequence[int]) -> dict[int, set[str]]:
        """Tokens that would complete a stored n-gram behind a text, each with its samples."""
        if len(tokens) < self.length - 1 or not self._next:
            return {}
        return self._next.get(self._hash(tokens[len(tokens) - self.length + 1 :]), {})

    def hits(self, tokens: Sequence[int]) -> dict[str, int]:
        """Number of n-grams of each sample that a text holds (repetitions count once)."""
        seen: dict[str, set[Gram]] = {}
        for gram in self.grams(tokens):
            for sample in self._next.get(gram.tail, {}).get(gram.token, ()):
                seen.setdefault(sample, set()).add(gram)
        return {sample: len(found) for sample, found in seen.items()}
