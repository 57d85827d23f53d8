"""Sparse form of what a pruned tensor changed: one bit an entry, and the changed values alone."""

# Shapes: N entries of one chunk, K of them changed.
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

_UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}


class BitPacker:
    """Packs masks of any length into whole bytes, carrying the rest to the next mask."""

    def __init__(self) -> None:
        self._rest = np.empty(0, dtype=bool)

    def push(self, mask_N: np.ndarray) -> np.ndarray:
        """Bytes that became complete, uint8."""
        joined = np.concatenate([self._rest, mask_N]) if len(self._rest) else mask_N
        whole = len(joined) // 8 * 8
        self._rest = joined[whole:].copy()
        return np.packbits(joined[:whole])

    def rest(self) -> np.ndarray:
        """The last byte, padded with zeros; empty where nothing is left."""
        return np.packbits(self._rest)


def unpacked(bits: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Mask of entries [start, stop), from the packed bytes that begin with entry ``start // 8 * 8``."""
    first = start % 8
    return np.unpackbits(bits, count=first + stop - start)[first:].view(bool)


def as_bits(values_N: Tensor) -> np.ndarray:
    """The stored bits of a flat tensor as unsigned integers, sharing its memory."""
    return values_N.view(_UNSIGNED[values_N.element_size()]).numpy()


def flips(base_N: Tensor, out_N: Tensor, mask_N: np.ndarray) -> np.ndarray:
    """``bits(W) ^ bits(out)`` at the mask, (K,): added to W it gives out, added again it gives W back."""
    return (as_bits(base_N) ^ as_bits(out_N))[mask_N]


def flipped(values_N: Tensor, mask_N: np.ndarray, flips_K: np.ndarray) -> Tensor:
    """A copy of ``values_N`` whose masked entries have their bits flipped; its own inverse."""
    bits = as_bits(values_N).copy()
    bits[mask_N] ^= flips_K
    return torch.from_numpy(bits).view(values_N.dtype)


def placed(values_N: Tensor, mask_N: np.ndarray, new_K: Tensor) -> Tensor:
    """A copy of ``values_N`` in the dtype of ``new_K``, whose masked entries are ``new_K``."""
    out = values_N.to(new_K.dtype, copy=True)
    out[torch.from_numpy(mask_N)] = new_K
    return out


def byte_ranges(numel: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of entries that begin at whole bytes of a packed mask."""
    step = -(-size // 8) * 8
    return ((start, min(start + step, numel)) for start in range(0, numel, step))
