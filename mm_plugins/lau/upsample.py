"""LaU as an up-sample layer that `mmcv.cnn.build_upsample_layer` finds under every scope."""

from typing import Any, Literal

import torch.nn as nn
from mmcv.cnn import ConvModule
from mmengine.registry import MODELS
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mm_plugins.lau.offsets import DySampleBranch, Init, OffsetBranch, ZeroBranch
from mm_plugins.lau.sampling import (
    Backend,
    BaseGrid,
    BorderGradient,
    location_aware_upsample,
    scale_pair,
)

Branch = Literal["lau", "dysample", "zero"]
BRANCHES = ("lau", "dysample", "zero")


# The root registry: the layer is then found with mmseg's scope, with mmdet's, and with none.
@MODELS.register_module()
@MODELS.register_module(name="location_aware")
class LaUUpsample(nn.Module):
    """Location-aware upsampling: `location_aware_upsample` with its offset branch.

    In a config: ``upsample_cfg=dict(type="LaUUpsample", scale_factor=2)``.

    Args:
        in_channels: Channels of the feature that the offsets are predicted from.
        scale_factor: Whole factor k, or (k_h, k_w).
        out_channels: Append a 1x1 convolution to that many channels; None or `in_channels` appends nothing.
        channels: Another name of `in_channels`, as in CARAFEPack.
        with_cp: Recompute in backward to save memory.
        norm_cfg: Normalisation of the appended convolution.
        act_cfg: Activation of the appended convolution.
        mid_channels: Channels inside LaU's offset branch.
        num_groups: Offset fields; 1 shares one among all channels, as in the paper.
        base_grid: Where a zero offset samples: ``half_pixel`` (as F.interpolate), ``asymmetric`` (p/k, the
            paper's), ``align_corners``.
        init: Of the branch's last convolution: ``small``, ``xavier`` (the paper's) or ``zero``.
        max_offset: Bound of the offsets in cells, or None.
        branch: ``lau``, ``dysample`` (offsets of that method), ``zero`` (control without offsets).
        border_gradient: ``inclusive``, or ``inward`` to let offsets come back that left the map.
        backend: ``auto``, ``rows``, ``grid_sample``, or ``triton`` (CUDA kernels; never run on a GPU yet).

    Raises:
        ValueError: If the channels are missing or given twice, or an option is unknown.

    Source: LaU, arXiv 1911.05250. The paper's preset is ``base_grid="asymmetric", init="xavier"``.
    """

    def __init__(
        self,
        in_channels: int | None = None,
        scale_factor: int | tuple[int, int] = 4,
        out_channels: int | None = None,
        *,
        channels: int | None = None,
        with_cp: bool = False,
        norm_cfg: dict[str, Any] | None = None,
        act_cfg: dict[str, Any] | None = None,
        mid_channels: int = 128,
        num_groups: int = 1,
        base_grid: BaseGrid = "half_pixel",
        init: Init = "small",
        max_offset: float | None = None,
        branch: Branch = "lau",
        border_gradient: BorderGradient = "inclusive",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if (in_channels is None) == (channels is None):
            raise ValueError(
                f"give in_channels, or its other name channels, once; got in_channels={in_channels} and "
                f"channels={channels}."
            )
        width = in_channels if in_channels is not None else channels
        assert width is not None, "one of the two names is given"
        self.scale_factor, self.base_grid = scale_pair(scale_factor), base_grid
        self.num_groups = num_groups
        self.border_gradient, self.backend, self.with_cp = border_gradient, backend, with_cp
        if branch == "lau":
            self.branch: OffsetBranch | DySampleBranch | ZeroBranch = OffsetBranch(
                width,
                scale_factor,
                mid_channels=mid_channels,
                num_groups=num_groups,
                init=init,
                max_offset=max_offset,
            )
        elif branch == "dysample":
            self.branch = DySampleBranch(width, scale_factor, num_groups=num_groups)
        elif branch == "zero":
            self.branch = ZeroBranch(scale_factor, num_groups=num_groups)
        else:
            raise ValueError(f"branch must be one of {', '.join(BRANCHES)}; got {branch!r}.")
        self.project = None
        if out_channels not in (None, width):
            self.project = ConvModule(width, out_channels, 1, norm_cfg=norm_cfg, act_cfg=act_cfg)

    def init_weights(self) -> None:
        """Draw the branch's weights anew; a head's own `init_cfg` does not reach them."""
        self.branch.init_weights()

    def offsets(self, guide: Tensor) -> Tensor:
        """Offsets (N, 2*G, k_h*h, k_w*w) in cells, vertical first."""
        return self.branch(guide)

    def sample(self, x: Tensor, offset: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """`location_aware_upsample` with this layer's options."""
        return location_aware_upsample(
            x,
            offset,
            scale_factor=self.scale_factor,
            size=size,
            base_grid=self.base_grid,
            border_gradient=self.border_gradient,
            backend=self.backend,
        )

    def forward(self, x: Tensor, guide: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        """Enlarge `x`.

        Args:
            x: Map (N, C, h, w).
            guide: Feature (N, in_channels, h, w) that the offsets come from; `x` itself by default.
            size: Output (H, W) if smaller than k times the map.

        Returns:
            Map (N, C or out_channels, H, W).
        """
        if self.with_cp and self.training and x.requires_grad:
            return checkpoint(self._enlarge, x, guide, size, use_reentrant=False)
        return self._enlarge(x, guide, size)

    def _enlarge(self, x: Tensor, guide: Tensor | None, size: tuple[int, int] | None) -> Tensor:
        out = self.sample(x, self.offsets(x if guide is None else guide), size)
        return out if self.project is None else self.project(out)
