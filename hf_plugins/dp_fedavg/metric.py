"""Figures of a global model on test records."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_plugins.rounds import TrainableVector


def record_loss(model: Callable[..., Any], batch: tuple[Tensor, ...]) -> Tensor:
    """Cross entropy of each record: of its class, or the mean over its positions.

    Args:
        model: Gives logits (records, classes) or (records, positions, classes).
        batch: Inputs and integer targets.

    Returns:
        Loss of each record.
    """
    inputs, targets = batch
    logits = model(inputs)
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return losses.view(targets.shape).flatten(1).mean(1) if targets.dim() > 1 else losses


class TestAccuracy:
    """``evaluate`` of the round engine: loss and accuracy of a vector on test records.

    Args:
        weights: The resident model.
        records: Inputs and targets.
        batch_size: Records at a time.
    """

    __test__ = False

    def __init__(
        self, weights: TrainableVector, records: tuple[Tensor, ...], *, batch_size: int = 512
    ) -> None:
        self.weights, self.records, self.batch_size = weights, records, batch_size

    def __call__(self, vector_D: Tensor) -> dict[str, float]:
        """Figures under ``test/``."""
        self.weights.write_(vector_D)
        return accuracy(self.weights.model, self.records, batch_size=self.batch_size)


def accuracy(model: nn.Module, records: tuple[Tensor, ...], *, batch_size: int = 512) -> dict[str, float]:
    """Mean loss and share of targets that are the most likely ones.

    Returns:
        ``test/loss`` and ``test/accuracy``, the latter in [0, 1].
    """
    model.eval()
    loss, right, total = 0.0, 0, 0
    with torch.no_grad():
        for index in torch.arange(len(records[0])).split(batch_size):
            inputs, targets = (tensor[index] for tensor in records)
            logits = model(inputs)
            loss += float(F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum"))
            right += int((logits.argmax(-1) == targets).sum())
            total += targets.numel()
    return {"test/loss": loss / total, "test/accuracy": right / total}
