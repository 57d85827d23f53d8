"""Which rows of an attention or feed-forward weight belong together, for every way in which models store
them.

A projection is described by its layout: ``separate`` (one matrix each for q, k and v), ``concatenated``
(all q rows, then k, then v) or ``interleaved`` (per key-value head its q heads, then its k, then its v).
"""

# Shapes: H heads, R rows of one head, O output rows, I inputs.
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["q", "k", "v", "concatenated", "interleaved"]
Select = Literal["top", "bottom", "random"]


def head_rows(layout: Layout, *, num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, Tensor]:
    """Row numbers of every head in one stored matrix.

    Args:
        layout: ``q``, ``k`` or ``v`` for a matrix of its own; ``concatenated`` or ``interleaved`` for a fused
            one.
        num_heads: Query heads.
        num_kv_heads: Key-value heads; each serves ``num_heads / num_kv_heads`` query heads.
        head_dim: Rows of a head.

    Returns:
        For each of ``q``, ``k``, ``v`` that the matrix holds, (H, R) int64 row numbers.

    Raises:
        ValueError: If the query heads cannot be shared out evenly.
    """
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}")
    counts = {"q": num_heads, "k": num_kv_heads, "v": num_kv_heads}
    if layout in counts:
        return {layout: torch.arange(counts[layout] * head_dim).view(-1, head_dim)}
    if layout == "concatenated":
        whole = torch.arange((num_heads + 2 * num_kv_heads) * head_dim).view(-1, head_dim)
        q, k, v = whole.split([num_heads, num_kv_heads, num_kv_heads])
        return {"q": q, "k": k, "v": v}
    if layout != "interleaved":
        raise ValueError(f"layout must be 'q', 'k', 'v', 'concatenated' or 'interleaved'; got {layout!r}")
    share = num_heads // num_kv_heads
    groups = torch.arange((num_heads + 2 * num_kv_heads) * head_dim).view(num_kv_heads, share + 2, head_dim)
    return {
        "q": groups[:, :share].reshape(-1, head_dim),
        "k": groups[:, share],
        "v": groups[:, share + 1],
    }


def select_rows(
    weight_OI: Tensor,
    blocks_HR: Tensor,
    *,
    ratio: float,
    select: Select = "top",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Rows of the blocks whose weights have the largest entry-wise L1 norm.

    Args:
        weight_OI: Pre-trained weight; only read.
        blocks_HR: Row numbers of each block (head, or single row).
        ratio: Share of blocks, in [0, 1]; ``int(ratio * H)`` of them are taken.
        select: ``top`` (the paper's reading), ``bottom``, or ``random``.
        generator: Source of ``random``.

    Returns:
        Sorted row numbers, (int(ratio * H) * R,) int64.

    Raises:
        ValueError: If ``ratio`` lies outside of [0, 1], or ``select`` is unknown.

    Source: arXiv 2401.09796, SPF; data free, computed once from the pre-trained weight. Whether the paper
        takes the largest or the smallest norms could not be verified.
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio must lie in [0, 1]; got {ratio}. It is a share: write 0.05 for 5 %.")
    count = int(ratio * blocks_HR.shape[0])
    if select == "random":
        chosen = torch.randperm(blocks_HR.shape[0], generator=generator)[:count]
    elif select in ("top", "bottom"):
        # float64: equal heads of half-precision models must not be ordered by rounding of the sum.
        score_H = weight_OI.detach().double().abs().sum(1).cpu()[blocks_HR].sum(1)
        order = torch.sort(score_H, descending=select == "top", stable=True).indices
        chosen = order[:count]
    else:
        raise ValueError(f"select must be 'top', 'bottom' or 'random'; got {select!r}")
    return blocks_HR[chosen].flatten().sort().values
