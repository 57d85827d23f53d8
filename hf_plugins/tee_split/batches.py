"""Samples on the wire: hidden states of several samples joined without padding, their labels and lengths.

Two bytes a feature and four a label are all that a token costs; masks and positions follow from the lengths.
"""

# Shapes: N samples, T tokens of the longest one, S tokens of all together, D features.
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_plugins.tee_split.tensors import MessageError

IGNORED = -100
NAMES = {"hidden", "labels", "lengths"}


class Sample(NamedTuple):
    """One encoded sample."""

    hidden_TD: Tensor
    """Hidden state behind the client's last layer."""
    labels_T: Tensor
    """int32 token numbers, -100 where no loss is wanted."""


def join_samples(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Tensors of one message.

    Args:
        samples: At least one.

    Returns:
        ``hidden`` (S, D), ``labels`` (S,) int32, ``lengths`` (N,) int32.
    """
    return {
        "hidden": torch.cat([sample.hidden_TD for sample in samples]),
        "labels": torch.cat([sample.labels_T.to(torch.int32) for sample in samples]),
        "lengths": torch.tensor([sample.labels_T.shape[0] for sample in samples], dtype=torch.int32),
    }


def check_samples(
    tensors: Mapping[str, Tensor], *, dim: int, dtype: torch.dtype, max_tokens: int, vocab_size: int
) -> None:
    """Check a received message before it is stored or computed with.

    Args:
        tensors: As received.
        dim: Features of the model.
        dtype: Of hidden states, as both sides agreed.
        max_tokens: Longest sample.
        vocab_size: Labels must be below.

    Raises:
        MessageError: If anything is not what `join_samples` makes.
    """
    if set(tensors) != NAMES:
        raise MessageError(f"samples have the tensors {sorted(NAMES)}; got {sorted(tensors)}")
    hidden, labels, lengths = tensors["hidden"], tensors["labels"], tensors["lengths"]
    if hidden.dtype != dtype or labels.dtype != torch.int32 or lengths.dtype != torch.int32:
        raise MessageError(f"hidden states must be {dtype}, labels and lengths int32")
    if hidden.dim() != 2 or hidden.shape[1] != dim or labels.dim() != 1 or lengths.dim() != 1:
        raise MessageError(
            f"hidden states must be (S, {dim}), labels and lengths flat; got {tuple(hidden.shape)}"
        )
    if not lengths.numel() or int(lengths.min()) < 1 or int(lengths.max()) > max_tokens:
        raise MessageError(f"a sample has 1 to {max_tokens} tokens")
    if int(lengths.long().sum()) != hidden.shape[0] or labels.shape[0] != hidden.shape[0]:
        raise MessageError("lengths, labels and hidden states do not add up")
    if bool(((labels < 0) & (labels != IGNORED)).any()) or int(labels.max()) >= vocab_size:
        raise MessageError(f"labels must be {IGNORED} or below {vocab_size}")
    if not bool(torch.isfinite(hidden).all()):
        raise MessageError("hidden states hold inf or NaN")


def part_samples(tensors: Mapping[str, Tensor]) -> list[Sample]:
    """The samples of a checked message, as views."""
    sizes = tensors["lengths"].tolist()
    pairs = zip(tensors["hidden"].split(sizes), tensors["labels"].split(sizes), strict=True)
    return [Sample(hidden, labels) for hidden, labels in pairs]


def collate(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """A padded batch for the server's half.

    Args:
        samples: At least one.

    Returns:
        ``inputs_embeds`` (N, T, D), and ``attention_mask``, ``position_ids``, ``labels`` (N, T) int64; padded
        on the right with zeros, labels with -100.
    """
    longest = max(sample.labels_T.shape[0] for sample in samples)
    first = samples[0].hidden_TD
    embeds_NTD = first.new_zeros(len(samples), longest, first.shape[1])
    labels_NT = torch.full((len(samples), longest), IGNORED)
    mask_NT = torch.zeros_like(labels_NT)
    for row, sample in enumerate(samples):
        size = sample.labels_T.shape[0]
        embeds_NTD[row, :size], labels_NT[row, :size], mask_NT[row, :size] = (
            sample.hidden_TD,
            sample.labels_T,
            1,
        )
    positions_NT = torch.arange(longest).expand_as(labels_NT).contiguous()
    return {
        "inputs_embeds": embeds_NTD,
        "attention_mask": mask_NT,
        "position_ids": positions_NT,
        "labels": labels_NT,
    }


def num_targets(labels_NT: Tensor) -> int:
    """How many next tokens a batch predicts: labels that count, without each sample's first."""
    return int((labels_NT[:, 1:] != IGNORED).sum())
