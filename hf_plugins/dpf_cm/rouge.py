"""ROUGE-L on token lists: longest common subsequence, its running bound, exact extraction."""

from collections.abc import Hashable, Sequence


class RunningLCS:
    """Length of the longest common subsequence of a fixed reference and a text that grows token by token.

    Bit-parallel: one integer holds a row of the table, so a token costs ``|reference| / 64`` machine words.

    Args:
        reference: The tokens compared with.
    """

    def __init__(self, reference: Sequence[Hashable]) -> None:
        self.size = len(reference)
        self._places: dict[Hashable, int] = {}
        for place, token in enumerate(reference):
            self._places[token] = self._places.get(token, 0) | (1 << place)
        self._all = (1 << self.size) - 1
        self._row = self._all
        self.num_tokens = 0

    def push(self, token: Hashable) -> None:
        """Take one more token of the growing text."""
        hits = self._row & self._places.get(token, 0)
        self._row = ((self._row + hits) | (self._row - hits)) & self._all
        self.num_tokens += 1

    @property
    def length(self) -> int:
        """Current length of the longest common subsequence."""
        return self.size - self._row.bit_count()

    def reachable(self) -> float:
        """ROUGE-L that no continuation can exceed: ``2|a| / (2|a| + t - LCS_t)``.

        At best the ``|a| - LCS_t`` missing tokens follow and nothing else.
        """
        return 2 * self.size / (2 * self.size + self.num_tokens - self.length) if self.size else 0.0


def lcs_length(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence of two token lists."""
    running = RunningLCS(a)
    for token in b:
        running.push(token)
    return running.length


def rouge_l(candidate: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    """``F = 2 LCS / (|a| + |b|)``; 0 if both are empty.

    Tokens are the caller's choice: characters for Chinese, words otherwise. (The tokenizer of the package
    ``rouge_score`` keeps a-z and 0-9 only: two equal Chinese sentences score 0 with it.)
    """
    total = len(candidate) + len(reference)
    return 2 * lcs_length(reference, candidate) / total if total else 0.0
