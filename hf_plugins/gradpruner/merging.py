"""Fold dropped layers into a kept one, module by module and in row blocks."""

# Shapes: M output features, N input features, R rank, T steps, B rows of one block.
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from hf_plugins.gradpruner.importance import importance_rows
from hf_plugins.gradpruner.masks import TopMask, largest_entries

Weighting = Literal["none", "importance"]
# Entries of one row block: 4 MiB in fp32, about 50 MB with all that is computed of it for three donors.
BLOCK_ENTRIES = 1 << 20


class Rows(Protocol):
    """A matrix that gives row blocks: a tensor, or a slice of a file that is read when asked."""

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Rows ``start:stop``."""
        ...


class Donor(NamedTuple):
    """One module of a layer that goes."""

    weight_MN: Rows
    """Its weight, same shape as the receiver's."""
    left_TMR: Tensor
    """First gradient factors of all steps, in the layout of the weight."""
    right_TRN: Tensor
    """Second gradient factors."""


class MergeCounts(NamedTuple):
    """What one merge did."""

    num_entries: int
    """Entries of the receiver."""
    num_masked: int
    """Entries inside the donors' masks, summed over donors."""
    num_merged: int
    """Donor entries that were added (inside the mask, same sign), summed over donors."""


def same_sign(receiver: Tensor, donor: Tensor) -> Tensor:
    """Where ``receiver * donor > 0``, from sign bits: a product of small fp16 numbers underflows to 0."""
    return (receiver.signbit() == donor.signbit()) & (receiver != 0) & (donor != 0)


def merge_block(
    receiver_BN: Tensor,
    donors_BN: Sequence[Tensor],
    masks_BN: Sequence[Tensor],
    shares_BN: Sequence[Tensor | None],
) -> Tensor:
    """``R + sum over donors of mask * 1[R * D > 0] * D``; signs are those of the receiver before any merge.

    Args:
        receiver_BN: Rows of the kept layer's weight.
        donors_BN: The same rows of each donor.
        masks_BN: Important entries of each donor, bool.
        shares_BN: A factor for each entry of a donor, or None for 1 (paper).

    Returns:
        New rows in fp32; no scaling, no averaging.

    Source: GradPruner, arXiv 2601.19503, sign-consistent merging; summed in fp32 (the authors' code in bf16).
    """
    result_BN = receiver_BN.float().clone()
    for donor_BN, mask_BN, share_BN in zip(donors_BN, masks_BN, shares_BN, strict=True):
        added_BN = donor_BN.float() * (mask_BN & same_sign(receiver_BN, donor_BN))
        result_BN += added_BN if share_BN is None else added_BN * share_BN
    return result_BN


def row_blocks(num_rows: int, num_columns: int) -> Iterator[tuple[int, int]]:
    """Row ranges of at most `BLOCK_ENTRIES` entries, at least one row each."""
    rows = max(1, BLOCK_ENTRIES // max(1, num_columns))
    for start in range(0, num_rows, rows):
        yield start, min(num_rows, start + rows)


def merge_module(
    receiver_MN: Tensor,
    donors: Sequence[Donor],
    *,
    keep: float = 0.2,
    weighting: Weighting = "none",
    receiver_factors: tuple[Tensor, Tensor] | None = None,
) -> MergeCounts:
    """Merge donors into ``receiver_MN`` in place: sparsify each donor, add what has the receiver's sign.

    Each donor keeps its ``int(keep * numel)`` entries of largest importance F (of equal ones the first); the
    receiver is not sparsified.

    Args:
        receiver_MN: Weight of the kept layer, any float dtype; overwritten. Computed in fp32, cast once.
        donors: Weights and gradient factors of the layers that go.
        keep: Share of a donor's entries that may be merged, in [0, 1].
        weighting: ``importance`` scales a donor's entry by ``F_d / (F_d + F_r)``; ``none`` adds it whole
            (paper).
        receiver_factors: ``left`` (T, M, R) and ``right`` (T, R, N) of the receiver, for ``importance``.

    Returns:
        Counts of masked and merged entries.

    Raises:
        ValueError: If a donor's shape differs, or ``importance`` comes without the receiver's factors.
    """
    num_rows, num_columns = receiver_MN.shape
    for donor in donors:
        shape = (donor.left_TMR.shape[1], donor.right_TRN.shape[2])
        if shape != (num_rows, num_columns):
            raise ValueError(
                f"a donor of shape {shape} cannot be merged into {(num_rows, num_columns)}; only layers of "
                "one shape can."
            )
    if weighting == "importance" and receiver_factors is None:
        raise ValueError(
            "weighting='importance' needs the receiver's gradient factors; keep the full history."
        )
    ranges = list(row_blocks(num_rows, num_columns))

    def importance(donor: Donor) -> Iterator[Tensor]:
        for start, stop in ranges:
            yield importance_rows(donor.left_TMR, donor.right_TRN, start, stop)

    k_keep = int(keep * num_rows * num_columns)
    masks = [TopMask(largest_entries(partial(importance, donor), k_keep)) for donor in donors]
    num_masked = num_merged = 0
    for start, stop in ranges:
        old_BN = receiver_MN[start:stop].clone()
        donors_BN = [donor.weight_MN[start:stop] for donor in donors]
        f_BN = [importance_rows(donor.left_TMR, donor.right_TRN, start, stop) for donor in donors]
        masks_BN = [mask(block) for mask, block in zip(masks, f_BN, strict=True)]
        shares_BN: list[Tensor | None] = [None] * len(donors)
        if weighting == "importance" and receiver_factors is not None:
            own_BN = importance_rows(*receiver_factors, start, stop)
            shares_BN = [
                block / (block + own_BN).clamp_min(torch.finfo(torch.float32).tiny) for block in f_BN
            ]
        receiver_MN[start:stop] = merge_block(old_BN, donors_BN, masks_BN, shares_BN).to(receiver_MN.dtype)
        num_masked += sum(int(mask.sum()) for mask in masks_BN)
        num_merged += sum(
            int((mask & same_sign(old_BN, donor)).sum())
            for mask, donor in zip(masks_BN, donors_BN, strict=True)
        )
    return MergeCounts(receiver_MN.numel(), num_masked, num_merged)


def merge_difference(receiver: Tensor, donors: Sequence[Rows]) -> None:
    """LaCo's merge, in place: ``R + sum over donors of (D - R)``, with the receiver as it was before.

    Args:
        receiver: Weight, bias or norm of the kept layer, one or two axes; computed in fp32, cast once.
        donors: The same tensor of the layers that go.

    Source: LaCo, arXiv 2402.11187, reserving-differences-while-seeking-common merge. The published notebook
        subtracts the running receiver instead, which leaves the last donor alone.
    """
    num_columns = receiver.shape[1] if receiver.ndim > 1 else 1
    for start, stop in row_blocks(receiver.shape[0], num_columns):
        old = receiver[start:stop].float()
        total = old.clone()
        for donor in donors:
            total += donor[start:stop].float() - old
        receiver[start:stop] = total.to(receiver.dtype)
