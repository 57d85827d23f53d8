"""Branches that predict where to sample: LaU's two convolutions per axis, and DySample's one."""

# Shapes: N images, C feature channels, Y x X low-resolution cells, H x W output pixels, G groups, O = 2*G.
from typing import Literal

import torch
import torch.nn as nn
from torch import Tensor

from mm_plugins.lau.sampling import scale_pair

Init = Literal["small", "xavier", "zero"]
INITS = ("small", "xavier", "zero")


def spread_cells(x_NCYX: Tensor, scale: tuple[int, int]) -> Tensor:
    """Pixel shuffle with one factor for each axis: (N, G*k_h*k_w, Y, X) to (N, G, k_h*Y, k_w*X)."""
    num_images, channels, rows, columns = x_NCYX.shape
    groups = channels // (scale[0] * scale[1])
    parts = x_NCYX.reshape(num_images, groups, *scale, rows, columns)
    return parts.permute(0, 1, 4, 2, 5, 3).reshape(num_images, groups, scale[0] * rows, scale[1] * columns)


class OffsetBranch(nn.Module):
    """LaU's offset branch, one stack for each axis: 1x1 conv, LeakyReLU, 3x3 conv, pixel shuffle; no bias.

    Args:
        in_channels: Channels of the feature that also feeds the classifier.
        scale_factor: Up-sampling factor k or (k_h, k_w).
        mid_channels: Channels between the two convolutions; the paper's cost table needs 128.
        num_groups: Offset fields per image; 1 shares one among all channels.
        init: Of the last convolution: ``small`` N(0, 0.001), ``xavier`` (the authors'), ``zero``.
        max_offset: Bound in cells, by tanh; None leaves offsets free, as in the paper.

    Raises:
        ValueError: If an option is out of range.

    Source: LaU, arXiv 1911.05250, Section 3.1 and `DiffBiUpsampling` of the authors' release. ``small`` and
    `max_offset` are ours.
    """

    def __init__(
        self,
        in_channels: int,
        scale_factor: int | tuple[int, int] = 4,
        *,
        mid_channels: int = 128,
        num_groups: int = 1,
        init: Init = "small",
        max_offset: float | None = None,
    ) -> None:
        super().__init__()
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}; got {init!r}.")
        if max_offset is not None and not max_offset > 0:
            raise ValueError(f"max_offset must be > 0 cells, or None for no bound; got {max_offset}.")
        self.scale, self.init, self.max_offset = scale_pair(scale_factor), init, max_offset
        per_cell = num_groups * self.scale[0] * self.scale[1]
        self.vertical = _axis(in_channels, mid_channels, per_cell)
        self.horizontal = _axis(in_channels, mid_channels, per_cell)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw all weights anew."""
        for stack in (self.vertical, self.horizontal):
            first, last = (stack.get_parameter(f"{index}.weight") for index in (0, 2))
            nn.init.xavier_uniform_(first)
            if self.init == "xavier":
                nn.init.xavier_uniform_(last)
            elif self.init == "small":
                nn.init.normal_(last, std=1e-3)
            else:
                nn.init.zeros_(last)

    def forward(self, feature_NCYX: Tensor) -> Tensor:
        """Offsets (N, 2*G, k_h*Y, k_w*X) in cells, vertical first; fp32 also under autocast."""
        return bound(
            torch.cat([self._one_axis(stack, feature_NCYX) for stack in (self.vertical, self.horizontal)], 1),
            self.max_offset,
        )

    def _one_axis(self, stack: nn.Sequential, feature_NCYX: Tensor) -> Tensor:
        hidden = stack[1](stack[0](feature_NCYX))
        return spread_cells(in_full_precision(stack[2], hidden), self.scale)


def _axis(in_channels: int, mid_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, mid_channels, 1, bias=False),
        nn.LeakyReLU(0.01, inplace=True),
        nn.Conv2d(mid_channels, out_channels, 3, padding=1, bias=False),
    )


def in_full_precision(layer: nn.Module, x: Tensor) -> Tensor:
    """Run a layer outside autocast, so that offsets are never rounded to half precision."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.to(next(layer.parameters()).dtype))


def bound(offset: Tensor, limit: float | None) -> Tensor:
    """Offsets squeezed into (-limit, limit) by tanh, with slope 1 at 0; unchanged for None."""
    return offset if limit is None else limit * torch.tanh(offset / limit)


class DySampleBranch(nn.Module):
    """The offsets of DySample ("linear + pixel shuffle"): a 1x1 conv, times 0.25 or a learned scope.

    Written from the paper's formula; no code of its release is used. With ``base_grid="half_pixel"`` the
    sampling points are DySample's.

    Args:
        in_channels: Channels of the feature.
        scale_factor: Up-sampling factor k or (k_h, k_w).
        num_groups: Groups of channels with their own offsets.
        dynamic_scope: Multiply by ``0.5 * sigmoid(conv1x1(x))`` and not by 0.25.

    Source: Learning to Upsample by Learning to Sample, arXiv 2308.15085, Section 3.2.
    """

    def __init__(
        self,
        in_channels: int,
        scale_factor: int | tuple[int, int] = 4,
        *,
        num_groups: int = 1,
        dynamic_scope: bool = False,
    ) -> None:
        super().__init__()
        self.scale = scale_pair(scale_factor)
        out_channels = 2 * num_groups * self.scale[0] * self.scale[1]
        self.offset = nn.Conv2d(in_channels, out_channels, 1)
        self.scope = nn.Conv2d(in_channels, out_channels, 1, bias=False) if dynamic_scope else None
        self.init_weights()

    def init_weights(self) -> None:
        """Draw all weights anew: N(0, 0.001), the scope at 0 so that it starts as 0.25."""
        nn.init.normal_(self.offset.weight, std=1e-3)
        nn.init.zeros_(self.offset.get_parameter("bias"))
        if self.scope is not None:
            nn.init.zeros_(self.scope.weight)

    def forward(self, feature_NCYX: Tensor) -> Tensor:
        """Offsets (N, 2*G, k_h*Y, k_w*X) in cells, vertical first; fp32 also under autocast."""
        offset = in_full_precision(self.offset, feature_NCYX)
        if self.scope is None:
            offset = 0.25 * offset
        else:
            offset = 0.5 * offset * in_full_precision(self.scope, feature_NCYX).sigmoid()
        return spread_cells(offset, self.scale)


class ZeroBranch(nn.Module):
    """Offsets that are always 0: the control that parts the base grid's effect from that of the offsets."""

    def __init__(self, scale_factor: int | tuple[int, int] = 4, *, num_groups: int = 1) -> None:
        super().__init__()
        self.scale, self.num_groups = scale_pair(scale_factor), num_groups

    def init_weights(self) -> None:
        """There is nothing to draw."""

    def forward(self, feature_NCYX: Tensor) -> Tensor:
        """Zeros (N, 2*G, k_h*Y, k_w*X) in fp32."""
        num_images, _, rows, columns = feature_NCYX.shape
        shape = (num_images, 2 * self.num_groups, self.scale[0] * rows, self.scale[1] * columns)
        return torch.zeros(shape, device=feature_NCYX.device)
