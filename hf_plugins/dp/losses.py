"""Losses that stay apart by record: each is a function of one record's logits and labels alone."""

# Shapes: B records, L positions, V classes or words.

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Problem = Literal["single_label_classification", "multi_label_classification", "regression"]


def token_losses(logits_BLV: Tensor, labels_BL: Tensor, *, shift: bool, ignore_index: int = -100) -> Tensor:
    """Cross entropy of each record, averaged over the record's own labelled positions.

    Averaging over the tokens of the batch instead, as Trainer does, makes one record's weight depend on the
    others' lengths, and its gradient is then no function of the record alone.

    Args:
        logits_BLV: Scores.
        labels_BL: Class of each position; ``ignore_index`` marks positions that do not count.
        shift: Position t predicts label t + 1 (causal language models) instead of label t.
        ignore_index: See above.

    Returns:
        Losses ``[B]``, float32; 0 for a record without any labelled position.
    """
    if shift:
        logits_BLV, labels_BL = logits_BLV[:, :-1], labels_BL[:, 1:]
    losses_BL = F.cross_entropy(
        logits_BLV.float().transpose(1, 2), labels_BL, ignore_index=ignore_index, reduction="none"
    )
    count_B = (labels_BL != ignore_index).sum(1).clamp(min=1)
    return losses_BL.sum(1) / count_B


def classification_losses(logits_BV: Tensor, labels: Tensor, *, problem: Problem) -> Tensor:
    """Loss of each record of a classifier or regressor.

    Args:
        logits_BV: Scores, or predictions.
        labels: ``[B]`` classes (single label), ``[B, V]`` zeros and ones (multi label), ``[B]`` or ``[B, V]``
            targets (regression).
        problem: Which of the three.

    Returns:
        Losses ``[B]``, float32.
    """
    if problem == "single_label_classification":
        return F.cross_entropy(logits_BV.float(), labels.view(-1), reduction="none")
    target_BV = labels.view(logits_BV.shape).float()
    if problem == "regression":
        return (logits_BV.float() - target_BV).square().mean(1)
    return F.binary_cross_entropy_with_logits(logits_BV.float(), target_BV, reduction="none").mean(1)


def span_losses(start_BL: Tensor, end_BL: Tensor, first_B: Tensor, last_B: Tensor) -> Tensor:
    """Loss of each record of extractive question answering; a position beyond the text does not count.

    Args:
        start_BL: Scores of the answer's first position.
        end_BL: Scores of its last position.
        first_B: True first position.
        last_B: True last position.

    Returns:
        Losses ``[B]``, float32: half the sum of both cross entropies.
    """
    length = start_BL.shape[1]

    def one(scores_BL: Tensor, target_B: Tensor) -> Tensor:
        kept_B = torch.where((target_B >= 0) & (target_B < length), target_B, -100)
        return F.cross_entropy(scores_BL.float(), kept_B, ignore_index=-100, reduction="none")

    return (one(start_BL, first_B) + one(end_BL, last_B)) / 2
