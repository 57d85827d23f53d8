"""The hot map: which row of an embedding table points the way a vector points."""

# Shapes: T tokens, D width, V rows of the table, K best rows kept.
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Scores of one block, at most: 2**24 floats are 64 MiB, whatever the vocabulary.
_BLOCK_SCORES = 1 << 24


class Matches(NamedTuple):
    """The best rows of each vector, best first."""

    ids_TK: Tensor
    """Row numbers, int64; of rows that are copies of each other, the lowest."""
    scores_TK: Tensor
    """Cosines (or logits), fp32, falling along K."""


def unit_rows(x_TD: Tensor) -> Tensor:
    """Rows scaled to length 1, in fp32; a row of zeros stays one.

    Args:
        x_TD: Vectors (T, D) of any float dtype.

    Returns:
        (T, D) fp32.
    """
    x_TD = x_TD.float()
    return x_TD / x_TD.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def lowest_twins(rows_VD: Tensor) -> Tensor:
    """For each row, the lowest number of a row with equal content.

    Equal rows bound what any attack can recover, and a matrix product may rank them either way.

    Args:
        rows_VD: Table (V, D).

    Returns:
        (V,) int64; its own number where a row has no copy before it.
    """
    # Adding zero turns -0.0 into 0.0: the two are equal but differ in their bytes.
    rows = np.ascontiguousarray((rows_VD.detach().float() + 0.0).cpu().numpy())
    keys = rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize))).ravel()
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return torch.from_numpy(first[inverse.ravel()].astype(np.int64))


def best_rows(query_TD: Tensor, table_VD: Tensor, twins_V: Tensor, *, top: int = 1) -> Matches:
    """The rows with the largest inner product, in blocks so that the T x V map is never whole in memory.

    Args:
        query_TD: Vectors (T, D), fp32.
        table_VD: Rows (V, D), fp32; unit rows on both sides make the product a cosine.
        twins_V: Result of `lowest_twins` for the table.
        top: How many rows to keep, 1 .. V.

    Returns:
        The ``top`` best rows of each vector.

    Raises:
        ValueError: If the widths differ, ``top`` is out of range, or a vector is not finite.

    Source: Embed Parrot, arXiv 2405.11916, HEI; the blocks are ours.
    """
    if query_TD.shape[1] != table_VD.shape[1]:
        raise ValueError(
            f"hidden states have width {query_TD.shape[1]}, the table has {table_VD.shape[1]}; attack the "
            "states of the model that this table belongs to, or map them to its width first."
        )
    if not 1 <= top <= table_VD.shape[0]:
        raise ValueError(f"top must lie in 1 .. {table_VD.shape[0]} (rows of the table); got {top}.")
    if not torch.isfinite(query_TD).all():
        bad = int((~torch.isfinite(query_TD)).any(1).sum())
        raise ValueError(
            f"{bad} of {len(query_TD)} hidden states hold NaN or infinity; look for overflow in the "
            "model's dtype before you attack it."
        )
    ids, scores = [], []
    twins_V = twins_V.to(query_TD.device)
    for block_TD in query_TD.split(max(1, _BLOCK_SCORES // table_VD.shape[0])):
        map_TV = block_TD @ table_VD.T
        # argmax promises the first of equal maxima, topk does not.
        if top == 1:
            best_T1 = map_TV.argmax(1, keepdim=True)
            score_T1 = map_TV.gather(1, best_T1)
        else:
            score_T1, best_T1 = map_TV.topk(top, dim=1)
        ids.append(twins_V[best_T1])
        scores.append(score_T1)
    if not ids:
        return Matches(query_TD.new_zeros(0, top, dtype=torch.int64), query_TD.new_zeros(0, top))
    return Matches(torch.cat(ids), torch.cat(scores))
