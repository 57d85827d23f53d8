"""LaU's location supervision: where each pixel had better sampled, and how much more such pixels count."""

# Shapes: N images, C classes, Y x X low-resolution cells, H x W output pixels, K candidate cells.
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_plugins.lau.sampling import BaseGrid, base_coordinates, location_aware_upsample


class Targets(NamedTuple):
    """What the regression mode asks of each pixel.

    Attributes:
        offset_N2HW: Offset that would sample the best candidate cell, or the pixel's own; fp32, no gradient.
        weight_NHW: Lambda: 1, or 1 + lambda where a candidate is better.
        moved_NHW: Where a candidate is better, bool.
    """

    offset_N2HW: Tensor
    weight_NHW: Tensor
    moved_NHW: Tensor


def two_sided(logits_NCYX: Tensor) -> Tensor:
    """Logits of softmax; the one logit of a sigmoid becomes the pair (0, logit), which is the same model."""
    if logits_NCYX.shape[1] > 1:
        return logits_NCYX
    return torch.cat([torch.zeros_like(logits_NCYX), logits_NCYX], dim=1)


def pixel_loss(logits_NCHW: Tensor, label_NHW: Tensor, ignore_index: int = 255) -> Tensor:
    """Cross entropy of every pixel (N, H, W) in fp32 or fp64; 0 at ignored pixels."""
    wide = two_sided(logits_NCHW)
    wide = wide if wide.dtype == torch.float64 else wide.float()
    return F.cross_entropy(wide, label_NHW, ignore_index=ignore_index, reduction="none")


def _axis_cells(num_cells: int, base: Tensor, step: int) -> Tensor:
    """Cell of one axis for every pixel: floor of the base point plus `step`, or ceil plus ``step - 1``."""
    inside = base.clamp(0, num_cells - 1)
    cell = inside.floor() + step if step <= 0 else inside.ceil() + step - 1
    return cell.clamp(0, num_cells - 1).long()


def candidate_steps(search_radius: int) -> list[tuple[int, int]]:
    """Steps (rows, columns) around the base point, the paper's four first.

    0 is the cell at or before the point and 1 the cell at or after it, so that on a whole coordinate both are
    that cell. Order of the four: (0, 0), (1, 0), (0, 1), (1, 1). A radius r adds rings around them:
    (2r + 2)^2 in all.
    """
    first = [(0, 0), (1, 0), (0, 1), (1, 1)]
    reach = range(-search_radius, search_radius + 2)
    return first + [(y, x) for y in reach for x in reach if (y, x) not in first]


def location_targets(
    logits_NCYX: Tensor,
    offset_N2HW: Tensor,
    label_NHW: Tensor,
    own_loss_NHW: Tensor,
    *,
    scale: tuple[int, int],
    base_grid: BaseGrid = "asymmetric",
    lambda_: float = 0.3,
    search_radius: int = 0,
    margin: float = 1e-6,
    ignore_index: int = 255,
) -> Targets:
    """Best candidate cell of each pixel: one whose own cross entropy is below that of the sampled point.

    The loss of a cell is ``logsumexp(U[:, cell]) - U[label, cell]``. The first term is taken once per cell at
    low resolution, so that the whole needs two scalars per pixel and candidate, whatever the number of
    classes; the result equals that of enlarging the logits once per candidate.

    Args:
        logits_NCYX: Low-resolution logits; no gradient flows.
        offset_N2HW: The offsets that were used, in cells.
        label_NHW: Labels at the resolution of the offsets.
        own_loss_NHW: Cross entropy at the sampled points, `pixel_loss` of the enlarged logits.
        scale: Up-sampling factors (k_h, k_w).
        base_grid: Where a zero offset samples.
        lambda_: What a pixel with a better candidate counts more.
        search_radius: Rings of cells around the four neighbours that are tried as well; 0 is the paper's.
        margin: A candidate must be better by this much: samples on a cell tie with it up to rounding.
        ignore_index: Label of pixels that do not count: their target is their own offset.

    Returns:
        Targets, weights and moved pixels; no gradient.

    Source: LaU, arXiv 1911.05250, Section 3.2, regression loss; the log-sum-exp form, `search_radius` and
    `margin` are ours (margin 0 and radius 0 give the authors' targets).
    """
    with torch.no_grad():
        wide = two_sided(logits_NCYX)
        wide = wide if wide.dtype == torch.float64 else wide.float()
        num_rows, num_columns = wide.shape[2:]
        height, width = label_NHW.shape[1:]
        base_H = base_coordinates(height, num_rows, scale[0], base_grid, wide)
        base_W = base_coordinates(width, num_columns, scale[1], base_grid, wide)
        valid_NHW = label_NHW != ignore_index
        label_NP = label_NHW.where(valid_NHW, 0).flatten(1)
        logsum_NK, score_NK = wide.logsumexp(1).flatten(1), wide.flatten(1)
        best_NP = own_loss_NHW.to(wide.dtype).flatten(1).clone()
        own = offset_N2HW.detach().to(wide.dtype)
        ty_NP, tx_NP = (own[:, axis].flatten(1).clone() for axis in (0, 1))
        moved_NP = torch.zeros_like(best_NP, dtype=torch.bool)
        score_start_NP = label_NP * (num_rows * num_columns)
        for down, right in candidate_steps(search_radius):
            row, column = _axis_cells(num_rows, base_H, down), _axis_cells(num_columns, base_W, right)
            cell_P = (row[:, None] * num_columns + column).flatten()
            loss_NP = logsum_NK[:, cell_P] - score_NK.gather(1, score_start_NP + cell_P)
            better_NP = (loss_NP < best_NP - margin) & valid_NHW.flatten(1)
            best_NP = torch.where(better_NP, loss_NP, best_NP)
            step_y = (row - base_H)[:, None].expand(height, width).flatten()
            step_x = (column - base_W).expand(height, width).flatten()
            ty_NP, tx_NP = torch.where(better_NP, step_y, ty_NP), torch.where(better_NP, step_x, tx_NP)
            moved_NP = moved_NP | better_NP
        moved_NHW = moved_NP.view_as(label_NHW)
        target = torch.stack([ty_NP.view_as(own[:, 0]), tx_NP.view_as(own[:, 0])], dim=1)
        return Targets(target, 1 + lambda_ * moved_NHW.to(wide.dtype), moved_NHW)


def offset_guided_weight(
    logits_NCYX: Tensor,
    label_NHW: Tensor,
    own_loss_NHW: Tensor,
    *,
    scale: tuple[int, int],
    base_grid: BaseGrid = "asymmetric",
    lambda_: float = 0.3,
    punish_ties: bool = True,
    margin: float = 1e-6,
    ignore_index: int = 255,
) -> Tensor:
    """Lambda of the offset-guided mode: 1 where the offset beats plain bilinear sampling, else 1 + lambda.

    Args:
        logits_NCYX: Low-resolution logits; no gradient flows.
        label_NHW: Labels at the resolution of the offsets.
        own_loss_NHW: Cross entropy at the sampled points.
        scale: Up-sampling factors (k_h, k_w).
        base_grid: Where a zero offset samples.
        lambda_: What a pixel that is not better counts more.
        punish_ties: Count equality as not better (the paper: a zero offset is trivial); the authors' code,
            where this loss is commented out, does not.
        margin: Losses closer than this are equal: two computations of one value differ in the last bits.
        ignore_index: Label of pixels that do not count.

    Returns:
        Weights (N, H, W); ignored pixels have weight 1.

    Source: LaU, arXiv 1911.05250, Section 3.2, offset-guided loss.
    """
    with torch.no_grad():
        shape = (logits_NCYX.shape[0], 2, *label_NHW.shape[1:])
        full = (logits_NCYX.shape[2] * scale[0], logits_NCYX.shape[3] * scale[1])
        # One image at a time: this map is as large as the enlarged logits and is needed for a moment only.
        plain = [
            pixel_loss(
                location_aware_upsample(
                    image,
                    image.new_zeros(1, 2, *full),
                    scale_factor=scale,
                    size=shape[2:],
                    base_grid=base_grid,
                ),
                label,
                ignore_index,
            )
            for image, label in zip(logits_NCYX.detach().split(1), label_NHW.split(1), strict=True)
        ]
        plain_NHW = torch.cat(plain)
        own_NHW = own_loss_NHW.to(plain_NHW.dtype)
        worse_NHW = own_NHW - plain_NHW
        beaten = worse_NHW >= -margin if punish_ties else worse_NHW > margin
        return 1 + lambda_ * (beaten & (label_NHW != ignore_index)).to(plain_NHW.dtype)


def offset_regression(offset_N2HW: Tensor, target_N2HW: Tensor) -> Tensor:
    """Smooth L1 between offsets and their targets, mean over all pixels and both axes.

    Pixels whose target is their own offset add nothing but count in the mean, as in the authors' code.
    """
    return F.smooth_l1_loss(offset_N2HW.to(target_N2HW.dtype), target_N2HW, beta=1.0)
