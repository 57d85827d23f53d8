"""Registered losses between two feature pyramids: PKD's, and plain MSE as its control."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
from mmdet.registry import MODELS
from mmengine.dist import all_reduce, get_world_size
from mmengine.logging import print_log
from torch import Tensor

from mm_plugins.pkd.pearson import PearsonLoss, match_sizes, standardised_mse

Maps = Tensor | Sequence[Tensor]
"""One feature map or the maps of several levels."""


class LevelLoss(NamedTuple):
    """Loss of one level.

    Attributes:
        loss: Weighted scalar with gradient.
        correlation: Pearson's r, mean over the channels that are alive in both maps; in [-1, 1], no gradient.
        num_dead: How many channels are constant in the student or the teacher, as a float scalar.
    """

    loss: Tensor
    correlation: Tensor
    num_dead: Tensor


class ImitationLoss(nn.Module):
    """Common form of the losses here: weight, choice of the map that is resized, sum over levels."""

    def __init__(self, loss_weight: float = 1.0, resize_stu: bool = True) -> None:
        super().__init__()
        if not loss_weight >= 0:
            raise ValueError(
                f"{type(self).__name__}: loss_weight must be >= 0; got {loss_weight}. "
                "Use 6.0 for a two-stage teacher and 10.0 for a one-stage teacher, 0.0 to switch it off."
            )
        self.loss_weight, self.resize_stu = loss_weight, resize_stu
        self._warned_single_position = False

    def pair(self, student: Tensor, teacher: Tensor, valid: Tensor | None) -> PearsonLoss:
        """Unweighted loss of one pair of maps and the correlation of its channels."""
        raise NotImplementedError(f"{type(self).__name__} must implement pair(student, teacher, valid).")

    def levels(
        self,
        students: Sequence[Tensor],
        teachers: Sequence[Tensor],
        *,
        names: Sequence[str] | None = None,
        valid: Sequence[Tensor] | None = None,
    ) -> list[LevelLoss]:
        """Weighted loss, correlation and dead channels of each level.

        Args:
            students: Maps (N, C, H, W) that receive the gradient.
            teachers: As many target maps.
            names: Names of the levels for messages; ``level 0`` ... by default.
            valid: Boolean masks (N, 1, H, W), one per level, in the size after resizing.

        Returns:
            One result per level.

        Raises:
            ValueError: If the numbers of maps or their shapes do not fit, or the teacher is not finite.
        """
        if len(students) != len(teachers):
            raise ValueError(
                f"student and teacher must give the same number of maps; got {len(students)} and "
                f"{len(teachers)}. Pass only the levels that belong together."
            )
        names = names or [f"level {index}" for index in range(len(students))]
        results = []
        for index, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
            try:
                results.append(self.pair(student, teacher, None if valid is None else valid[index]))
            except ValueError as error:
                raise ValueError(f"{names[index]}: {error}") from error
        # One transfer for all levels: each read of a flag makes a GPU wait.
        finite = torch.stack([result.teacher_finite for result in results]).tolist()
        if not all(finite):
            broken = ", ".join(name for name, fine in zip(names, finite, strict=True) if not fine)
            raise ValueError(
                f"the teacher's features hold inf or NaN at: {broken}. Run the teacher in fp32 "
                "(distill.teacher_amp=None), and check that teacher_ckpt belongs to the teacher's config."
            )
        self._warn_single_position(students, teachers)
        return [
            LevelLoss(self.loss_weight * result.loss, *_summary(result.correlation_C, result.dead_C))
            for result in results
        ]

    def forward(self, preds_S: Maps, preds_T: Maps) -> Tensor:
        """Weighted loss, summed over levels.

        Args:
            preds_S: Student map (N, C, H, W), or a sequence of maps.
            preds_T: Teacher map or maps, as many; receives no gradient.

        Returns:
            Scalar in fp32 (fp64 for fp64 maps).
        """
        if isinstance(preds_S, Tensor) != isinstance(preds_T, Tensor):
            raise ValueError(
                "preds_S and preds_T must both be a tensor or both a tuple of tensors; got "
                f"{type(preds_S).__name__} and {type(preds_T).__name__}. Wrap the single map: (map,)."
            )
        students = (preds_S,) if isinstance(preds_S, Tensor) else preds_S
        teachers = (preds_T,) if isinstance(preds_T, Tensor) else preds_T
        return torch.stack([level.loss for level in self.levels(students, teachers)]).sum()

    def _warn_single_position(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> None:
        sizes = teachers if self.resize_stu else students
        if self._warned_single_position or all(x.shape[0] * x.shape[2] * x.shape[3] > 1 for x in sizes):
            return
        self._warned_single_position = True
        print_log(
            "a feature map has one position in the whole batch (1 image, 1 x 1), so it has no correlation: "
            "its loss is 0. Use larger images or batches, or leave the coarse level out of distill.levels.",
            logger="current",
            level=logging.WARNING,
        )


def _summary(correlation_C: Tensor, dead_C: Tensor) -> tuple[Tensor, Tensor]:
    num_dead = dead_C.sum().to(correlation_C.dtype)
    return correlation_C.sum() / (dead_C.numel() - num_dead).clamp(min=1), num_dead


def _sum_over_processes(values: Tensor) -> Tensor:
    all_reduce(values, op="sum")
    return values


@MODELS.register_module()
class PKDLoss(ImitationLoss):
    """Registered form of `standardised_mse`: in a config ``dict(type="PKDLoss", loss_weight=6.0)``.

    Drop-in for the authors' class of this name, with the same two arguments and call.

    Args:
        loss_weight: Factor of the loss, >= 0.
        resize_stu: Where sizes differ, resize the student's map (True) or the teacher's.
        sync_stats: Mean and std over the images of all processes and not of each alone; about 20 KB per step.
            Assumes that gradients are averaged over processes, as DDP does.

    Raises:
        ValueError: If `loss_weight` is negative; at a call, if maps do not fit or the teacher is not finite.

    Source: PKD, arXiv 2207.02039; `sync_stats` is ours.
    """

    def __init__(
        self, loss_weight: float = 1.0, resize_stu: bool = True, *, sync_stats: bool = False
    ) -> None:
        super().__init__(loss_weight, resize_stu)
        self.sync_stats = sync_stats

    def pair(self, student: Tensor, teacher: Tensor, valid: Tensor | None) -> PearsonLoss:
        """Unweighted PKD loss of one level."""
        return standardised_mse(
            student,
            teacher,
            valid_N1HW=valid,
            resize_student=self.resize_stu,
            reduce=_sum_over_processes if self.sync_stats else None,
            gradient_factor=get_world_size() if self.sync_stats else 1,
        )


@MODELS.register_module()
class PlainMSELoss(ImitationLoss):
    """Control for experiments: MSE of the raw maps, without standardisation, in fp32.

    Logs the same correlation as `PKDLoss`, so that the two can be compared.

    Args:
        loss_weight: Factor of the loss, >= 0; depends on the scale of the features, so there is no rule for
            it.
        resize_stu: Where sizes differ, resize the student's map (True) or the teacher's.
    """

    def pair(self, student: Tensor, teacher: Tensor, valid: Tensor | None) -> PearsonLoss:
        """Unweighted MSE of one level."""
        with torch.autocast(student.device.type, enabled=False):
            watched = standardised_mse(
                student.detach(), teacher, valid_N1HW=valid, resize_student=self.resize_stu
            )
            s, t = match_sizes(student, teacher.detach(), resize_student=self.resize_stu)
            if valid is None:
                return watched._replace(loss=(s - t).square().mean())
            count = valid.sum().clamp(min=1) * s.shape[1]
            return watched._replace(loss=(s - t).where(valid, 0).square().sum() / count)
