"""How much an entry of a task vector deserves to be kept: FAPM's score and those of the methods it is
compared with, chunk by chunk in scratch buffers.
"""

# Shapes: N entries of one tensor, flat; every array here is one chunk of them.
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

Method = Literal["fapm", "magnitude", "relative", "dare", "ties", "wise_ft"]
METHODS: tuple[str, ...] = get_args(Method)
CHUNK = 1 << 18


class Pair(Protocol):
    """One tensor before and after fine-tuning, readable in flat ranges, in whatever dtype it is stored."""

    numel: int

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Entries [start, stop) of the pre-trained and of the fine-tuned tensor, both (stop - start,)."""


class TensorPair:
    """Two tensors in memory as a `Pair`."""

    def __init__(self, w_pre: Tensor, w_ft: Tensor) -> None:
        self.numel = w_pre.numel()
        self._pre, self._ft = w_pre.detach().reshape(-1), w_ft.detach().reshape(-1)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Views of both tensors."""
        return self._pre[start:stop], self._ft[start:stop]


@dataclass(frozen=True)
class Rule:
    """Which score ranks the entries."""

    method: Method = "fapm"
    """fapm, magnitude, relative, dare, ties or wise_ft."""
    coefficient: float = 1.0
    """Factor on the mean magnitude in FAPM's score; 1 is the paper, 0 is plain magnitude."""
    seed: int = 0
    """Of DARE's random choice."""

    @property
    def masks(self) -> bool:
        """Whether the method chooses entries at all; WiSE-FT moves every entry part of the way."""
        return self.method != "wise_ft"

    def scale(self, keep: float) -> float:
        """Factor on the kept part of the task vector: 1 / keep for DARE, alpha = keep for WiSE-FT."""
        if self.method == "dare":
            return 1.0 / keep if keep else 1.0
        return keep if self.method == "wise_ft" else 1.0


def chunks(numel: int, size: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges that cover ``numel`` entries."""
    return ((start, min(start + size, numel)) for start in range(0, numel, size))


def mean_magnitude(pair: Pair, *, chunk: int = CHUNK) -> tuple[float, int]:
    """Mean of \\|W\\| over a tensor, and how many entries are exactly zero.

    Args:
        pair: The tensor; only its pre-trained half counts.
        chunk: Entries read at once.

    Returns:
        The mean, summed in fp64 and rounded to fp32 (mu of the paper), and the count of zeros.

    Source: FAPM, arXiv 2509.08255, the factor on the relative change.
    """
    total, zeros = 0.0, 0
    buffer_N = torch.empty(min(chunk, pair.numel))
    for start, stop in chunks(pair.numel, chunk):
        w_N = buffer_N[: stop - start].copy_(pair.read(start, stop)[0]).abs_()
        total += float(w_N.sum(dtype=torch.float64))
        zeros += stop - start - int(np.count_nonzero(w_N.numpy()))
    return float(np.float32(total / pair.numel)) if pair.numel else 0.0, zeros


def random_score(start: int, stop: int, *, seed: int) -> Tensor:
    """Uniform values in [0, 1) that depend on the flat index and the seed alone, not on chunks or order.

    Args:
        start: First index.
        stop: One past the last.
        seed: Chooses the sequence.

    Returns:
        fp32 values (stop - start,): the upper 24 bits of splitmix64.
    """
    with np.errstate(over="ignore"):
        x_N = np.arange(start, stop, dtype=np.uint64) + np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15)
        x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x_N ^= x_N >> np.uint64(31)
    return torch.from_numpy((x_N >> np.uint64(40)).astype(np.float32)).mul_(2.0**-24)


class Scorer:
    """Scores of one tensor, computed in fp32 in buffers that every chunk reuses.

    FAPM: ``S = |dW| - c * mu * (|dW| / |W|)`` with ``dW = W' - W``. Where W is 0 the score is -inf, its
    limit; the two-term form is kept as the authors wrote it, since the factored one rounds differently at the
    threshold. A tensor whose pre-trained half is all zero has no relative change: there S = \\|dW\\|.

    Source: FAPM, arXiv 2509.08255; the score of NaN (0/0) departs from the authors' script, which ranks it
    first.
    """

    def __init__(self, pair: Pair, rule: Rule, *, mu: float, chunk: int = CHUNK) -> None:
        self.pair, self.rule, self.mu, self.chunk = pair, rule, mu, chunk
        self._w, self._d, self._s = (torch.empty(min(chunk, pair.numel)) for _ in range(3))
        self._factor = float(np.float32(mu) * np.float32(rule.coefficient))

    @property
    def by_magnitude(self) -> bool:
        """Whether the score is \\|dW\\|: asked for, or the pre-trained tensor is all zero."""
        return self.rule.method in ("magnitude", "ties", "wise_ft") or (
            self.mu == 0 and self.rule.method in ("fapm", "relative")
        )

    def score(self, w_N: Tensor, ft_N: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Scores of one chunk; NaN stands for the -inf of 0/0 and compares false with everything.

        Args:
            w_N: Pre-trained entries, any float dtype.
            ft_N: Fine-tuned entries of the same length.
            start: Flat index of the first.

        Returns:
            Scores and ``|dW|``, fp32 buffers that the next call overwrites.
        """
        length = w_N.numel()
        w, d, s = self._w[:length], self._d[:length], self._s[:length]
        w.copy_(w_N)
        d.copy_(ft_N).sub_(w).abs_()
        if self.rule.method == "dare":
            return random_score(start, start + length, seed=self.rule.seed), d
        if self.by_magnitude:
            return d, d
        torch.div(d, w.abs_(), out=s)
        if self.rule.method == "relative":
            return s.neg_(), d
        # No alpha= in the subtraction: a fused multiply-add would round otherwise than the formula.
        return torch.sub(d, s.mul_(self._factor), out=s), d

    def scores(self) -> Iterator[tuple[int, Tensor]]:
        """Start and scores of every chunk in order, NaN replaced by -inf and -0 by 0, so that they sort."""
        for start, stop in chunks(self.pair.numel, self.chunk):
            s_N, _ = self.score(*self.pair.read(start, stop), start)
            yield start, torch.nan_to_num(s_N, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).add_(0.0)
