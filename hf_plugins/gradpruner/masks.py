"""The exact k largest entries of a matrix that is only ever seen in row blocks.

Non-negative fp32 numbers order like their bits, so two passes of counting (high 16 bits, then low 16 bits
inside one bin) give the k-th largest value exactly, with 2 x 65,536 counters as all the memory.
"""

# Shapes: B rows of one block, N columns.
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Blocks = Callable[[], Iterator[Tensor]]


class Cut(NamedTuple):
    """Where the k largest entries end."""

    bits: int
    """fp32 bit pattern of the k-th largest value; -1 if nothing is kept."""
    num_ties: int
    """How many entries equal to that value are kept: the first in row-major order."""


def _bits(block_BN: Tensor) -> Tensor:
    return block_BN.contiguous().view(torch.int32).flatten()


def _from_top(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bin that holds the ``wanted``-th entry counted from the top, and its rank inside that bin."""
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, wanted))
    above = int(from_top[place - 1]) if place else 0
    return len(counts) - 1 - place, wanted - above


def largest_entries(blocks: Blocks, k_keep: int) -> Cut:
    """Find the cut between the ``k_keep`` largest entries and the rest.

    Args:
        blocks: Called twice; gives the row blocks (B, N) of the matrix in order, fp32, >= 0.
        k_keep: Entries to keep.

    Returns:
        The cut, for `TopMask`.

    Raises:
        ValueError: If ``k_keep`` lies outside of the number of entries.
    """
    high = torch.zeros(1 << 16, dtype=torch.int64)
    total = 0
    for block_BN in blocks():
        high += torch.bincount(_bits(block_BN) >> 16, minlength=1 << 16)
        total += block_BN.numel()
    if not 0 <= k_keep <= total:
        raise ValueError(f"cannot keep {k_keep} of {total} entries; keep must lie in [0, 1].")
    if k_keep == 0:
        return Cut(-1, 0)
    top, rank = _from_top(high, k_keep)
    low = torch.zeros(1 << 16, dtype=torch.int64)
    for block_BN in blocks():
        bits = _bits(block_BN)
        low += torch.bincount(bits[bits >> 16 == top] & 0xFFFF, minlength=1 << 16)
    bottom, num_ties = _from_top(low, rank)
    return Cut(top << 16 | bottom, num_ties)


class TopMask:
    """Turns row blocks, given in order, into masks of the entries above the cut.

    Args:
        cut: What `largest_entries` found for the same blocks.
    """

    def __init__(self, cut: Cut) -> None:
        self._cut, self._ties_left = cut, cut.num_ties

    def __call__(self, block_BN: Tensor) -> Tensor:
        """Mask (B, N) of bool; over all blocks it holds exactly ``k_keep`` True."""
        if self._cut.bits < 0:
            return torch.zeros(block_BN.shape, dtype=torch.bool)
        bits = _bits(block_BN)
        kept, equal = bits > self._cut.bits, bits == self._cut.bits
        # Row-major order decides between equal entries, so the result does not depend on the block size.
        kept |= equal & (equal.cumsum(0) <= self._ties_left)
        self._ties_left = max(0, self._ties_left - int(equal.sum()))
        return kept.view(block_BN.shape)
