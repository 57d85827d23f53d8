"""Figures of a global model on test records."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_plugins.rounds import TrainableVector
from hf_plugins.whole_files import replacing

# Beginning of the metrics that say what LUS keeps of each tensor.
KEPT = "clients/lus_kept/"


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


def plot_rounds(
    runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], path: Path, *, title: str = ""
) -> None:
    """Draw accuracy, epsilon, update norms against S, and the share of users clipped, over rounds.

    Args:
        runs: For each method the histories of its seeds, as ``metrics.jsonl`` has them.
        path: Image to write; the ending decides the format.
        title: Above the picture.

    Raises:
        ImportError: If matplotlib is missing.
    """
    figure = _figure(11, 7)
    panels = {
        "test/accuracy": "test accuracy",
        "dp_fedavg/epsilon": "epsilon spent",
        "dp_fedavg/private/norm_median": "median norm before clipping / S",
        "dp_fedavg/private/clipped_ratio": "share of users clipped",
    }
    for axis, (name, label) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for method, histories in runs.items():
            rounds, low, middle, high = _band(histories, name)
            axis.plot(rounds, middle, label=method)
            axis.fill_between(rounds, low, high, alpha=0.2)
        axis.set_xlabel("round")
        axis.set_title(label)
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(title)
    _save(figure, path)


def plot_kept(history: Sequence[Mapping[str, Any]], path: Path, *, title: str = "") -> None:
    """Draw what LUS keeps of each tensor: the share of its squared norm, mean over users, over rounds.

    Args:
        history: Rows of ``metrics.jsonl`` of a run with ``log_private_statistics``.
        path: Image to write; the ending decides the format.
        title: Above the picture.

    Raises:
        ValueError: If the history holds no such figures.
        ImportError: If matplotlib is missing.
    """
    names = list(dict.fromkeys(name for row in history for name in row if name.startswith(KEPT)))
    if not names:
        raise ValueError(
            "the run holds nothing about what LUS keeps: it needs keep_ratio < 1 and log_private_statistics: "
            "true in the recipe's section dp, and noise_mode='central'."
        )
    figure = _figure(9, 1.5 + 0.28 * len(names))
    axis = figure.subplots()
    rows = [row for row in history if names[0] in row]
    shares = [[float(row[name]) for row in rows] for name in names]
    picture = axis.imshow(shares, aspect="auto", vmin=0, vmax=1, interpolation="nearest")
    axis.set_yticks(range(len(names)), [name.removeprefix(KEPT) for name in names], fontsize=7)
    axis.set_xticks([0, len(rows) - 1], [str(rows[0]["round"]), str(rows[-1]["round"])])
    axis.set_xlabel("round")
    figure.colorbar(picture, label="share of the squared norm that LUS keeps")
    figure.suptitle(title)
    _save(figure, path)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; run: pip install 'mmhf-plugins[report]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as part:
        figure.savefig(part, format=path.suffix.lstrip(".") or "png", dpi=100)


def _band(
    histories: Sequence[Sequence[Mapping[str, Any]]], name: str
) -> tuple[list[int], list[float], list[float], list[float]]:
    """Rounds at which every seed has the figure; smallest, mean and largest over the seeds."""
    series = [{int(row["round"]): _value(row, name) for row in h if name in row} for h in histories]
    rounds = sorted(set.intersection(*(set(s) for s in series))) if series else []
    columns = [[s[r] for s in series] for r in rounds]
    return rounds, [min(c) for c in columns], [sum(c) / len(c) for c in columns], [max(c) for c in columns]


def _value(row: Mapping[str, Any], name: str) -> float:
    scale = row["dp_fedavg/clipping_norm"] if name.endswith("norm_median") else 1.0
    return float(row[name]) / scale
