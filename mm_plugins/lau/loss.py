"""Registered form of LaU's location losses."""

from typing import Literal, NamedTuple

import torch
import torch.nn as nn
from mmseg.registry import MODELS
from torch import Tensor

from mm_plugins.lau.location_loss import location_targets, offset_guided_weight, offset_regression
from mm_plugins.lau.sampling import BaseGrid

MODES = ("off", "reg")


class LocationTerms(NamedTuple):
    """What the location loss adds to a segmentation loss.

    Attributes:
        weight: Factor (N, H, W) of each pixel's loss at the resolution of the offsets; no gradient.
        regression: Weighted regression loss of the offsets; None in mode ``off``.
        moved: Share of labelled pixels with a better candidate (``reg``) or not better than plain sampling
            (``off``); scalar without gradient.
    """

    weight: Tensor
    regression: Tensor | None
    moved: Tensor


@MODELS.register_module()
class LocationAwareLoss(nn.Module):
    """LaU's location supervision: ``lau=dict(loss=dict(type="LocationAwareLoss", mode="reg"))`` in a head.

    Args:
        mode: ``reg``: pixels for which a neighbouring cell classifies better count more, and their offset is
            pulled to that cell. ``off``: pixels that are not better than plain bilinear sampling count more.
        lambda_: How much more such a pixel counts, >= 0.
        gamma: Weight of the regression, >= 0; not used in mode ``off``.
        punish_ties: Mode ``off``: treat a loss equal to that of plain sampling as not better (the paper);
            False is the rule of the authors' code.
        search_radius: Mode ``reg``: rings of cells tried beyond the four neighbours; 0 is the paper's.
        margin: Losses closer than this count as equal; ties up to rounding are frequent.

    Raises:
        ValueError: If an option is out of range.

    Source: LaU, arXiv 1911.05250, Section 3.2; lambda 0.3 and gamma 0.1 as in the authors' scripts.
    """

    def __init__(
        self,
        mode: Literal["off", "reg"] = "reg",
        lambda_: float = 0.3,
        gamma: float = 0.1,
        *,
        punish_ties: bool = True,
        search_radius: int = 0,
        margin: float = 1e-6,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode must be 'off' (offset-guided) or 'reg' (regression); got {mode!r}.")
        if lambda_ < 0 or gamma < 0 or margin < 0:
            raise ValueError(
                f"lambda_, gamma and margin must be >= 0; got {lambda_}, {gamma}, {margin}. "
                "Leave lau.loss out to train without location loss."
            )
        if search_radius < 0 or int(search_radius) != search_radius:
            raise ValueError(
                f"search_radius must be a whole number >= 0; got {search_radius}. It counts rings of cells "
                "beyond the four neighbours."
            )
        self.mode, self.lambda_, self.gamma = mode, lambda_, gamma
        self.punish_ties, self.search_radius, self.margin = punish_ties, search_radius, margin

    def forward(
        self,
        logits: Tensor,
        offset: Tensor,
        own_loss: Tensor,
        label: Tensor,
        *,
        scale: tuple[int, int],
        base_grid: BaseGrid,
        ignore_index: int = 255,
    ) -> LocationTerms:
        """Weights and regression of one batch.

        Args:
            logits: Low-resolution logits (N, C, h, w); receive no gradient from here.
            offset: Offsets (N, 2, H, W) in cells; receive the regression's gradient.
            own_loss: Cross entropy (N, H, W) of the logits sampled with these offsets, 0 at ignored pixels;
                receives no gradient from here.
            label: Labels (N, H, W).
            scale: Up-sampling factors.
            base_grid: Where a zero offset samples.
            ignore_index: Label of pixels that do not count.

        Raises:
            ValueError: If there is more than one offset field per image.
        """
        if offset.shape[1] != 2:
            raise ValueError(
                f"the location loss needs one offset field shared by all classes; got {offset.shape[1] // 2}."
                " Set lau.num_groups=1, or leave lau.loss out."
            )
        own = own_loss.detach()
        if self.mode == "off":
            weight = offset_guided_weight(
                logits,
                label,
                own,
                scale=scale,
                base_grid=base_grid,
                lambda_=self.lambda_,
                punish_ties=self.punish_ties,
                margin=self.margin,
                ignore_index=ignore_index,
            )
            return LocationTerms(weight, None, _share(weight > 1, label, ignore_index))
        targets = location_targets(
            logits,
            offset,
            label,
            own,
            scale=scale,
            base_grid=base_grid,
            lambda_=self.lambda_,
            search_radius=self.search_radius,
            margin=self.margin,
            ignore_index=ignore_index,
        )
        regression = self.gamma * offset_regression(offset, targets.offset_N2HW)
        return LocationTerms(targets.weight_NHW, regression, _share(targets.moved_NHW, label, ignore_index))


def _share(chosen: Tensor, label: Tensor, ignore_index: int) -> Tensor:
    return chosen.sum() / (label != ignore_index).sum().clamp(min=1).to(torch.float32)
