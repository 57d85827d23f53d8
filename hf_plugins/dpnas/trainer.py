"""Train a DPNASNet with DP-SGD through the public `DPTrainer`, as a user would."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainingArguments

from hf_plugins.dp import DPConfig, DPTrainer
from hf_plugins.dpnas.model import DPNASNetForImageClassification, DPNASNetImageProcessor


class ImageRecords(torch.utils.data.Dataset):
    """Images and labels held in memory, one dictionary a record.

    Args:
        images: (N, C, H, W) float, normalised.
        labels: (N,) int64.

    Raises:
        ValueError: If the two differ in length.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if len(images) != len(labels):
            raise ValueError(f"every image needs a label; got {len(images)} images and {len(labels)} labels.")
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def stack_records(records: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One batch of several records; an empty list is an empty batch of Poisson sampling and handled by the
    trainer.
    """
    return {key: torch.stack([record[key] for record in records]) for key in records[0]}


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of right answers, as `Trainer` asks for metrics."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def make_trainer(
    model: DPNASNetForImageClassification,
    args: TrainingArguments,
    dp: DPConfig,
    train: Dataset | ImageRecords,
    evaluation: Dataset | ImageRecords | None = None,
    *,
    momentum: float = 0.9,
) -> DPTrainer:
    """A `DPTrainer` with the release's optimizer, SGD with momentum; the schedule is the host's.

    Args:
        model: The network.
        args: Arguments of the host; in the release ``learning_rate`` is 2.0, ``lr_scheduler_type`` constant
            (the host's default falls to 0) and the expected batch 2,048.
        dp: Privacy options; ``max_grad_norm`` is 0.1 in the release.
        train: Private images.
        evaluation: Images outside the guarantee.
        momentum: Momentum of SGD.

    Returns:
        The trainer; call ``train()``.

    Source: DPNAS, arXiv 2110.08557, and its release (dp_evaluate): SGD 2.0, momentum 0.9, C = 0.1.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=args.learning_rate, momentum=momentum)
    return DPTrainer(
        model=model,
        args=args,
        dp=dp,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=stack_records,
        compute_metrics=accuracy,
        optimizers=(optimizer, None),
    )


def save_for_pipeline(trainer: DPTrainer, folder: Path) -> None:
    """Write the trained model and its image processor, ready for ``pipeline("image-classification",
    folder)``.
    """
    trainer.save_model(str(folder))
    DPNASNetImageProcessor.for_model(trainer.model.config).save_pretrained(folder)
