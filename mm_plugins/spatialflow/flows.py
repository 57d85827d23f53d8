"""Four sub-networks over one pyramid level, and the flows that carry what the box regressor knows to the
others."""

# Shapes: N images, C channels, H x W cells.
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOWS = ("cls", "stuff", "mask", "stuff_mask")
"""Names of the flows: from regression to classification, stuff and mask, and from stuff to mask."""


class SubNetworks(NamedTuple):
    """Layers of the four sub-networks; an empty list means that a flow is switched off."""

    reg: Sequence[nn.Module]
    cls: Sequence[nn.Module]
    stuff: Sequence[nn.Module]
    mask: Sequence[nn.Module]
    cls_flow: Sequence[nn.Module]
    stuff_flow: Sequence[nn.Module]
    mask_flow: Sequence[nn.Module]
    stuff_mask_flow: Sequence[nn.Module]
    steered_cls: frozenset[int] = frozenset()
    """Steps whose convolution is deformable and steered by its flow."""
    steered_stuff: frozenset[int] = frozenset()
    steered_mask: frozenset[int] = frozenset()


class Features(NamedTuple):
    """Last features of the sub-networks, each (N, C, H, W)."""

    cls: Tensor
    reg: Tensor
    stuff: Tensor | None
    mask: Tensor | None


def split_steering(out: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets and modulation of a deformable convolution, from the answer of a flow convolution.

    Args:
        out: (N, 3k, H, W): 2k offsets, then k modulation logits.

    Returns:
        Offsets (N, 2k, H, W) and modulation (N, k, H, W) in (0, 1).
    """
    num = out.shape[1] // 3
    return out[:, : 2 * num], out[:, 2 * num :].sigmoid()


def receive(
    conv: Callable[..., Tensor],
    feature: Tensor,
    source: Tensor,
    flow: Callable[[Tensor], Tensor] | None,
    *,
    steered: bool = False,
    carried: Tensor | None = None,
) -> Tensor:
    """One convolution of a sub-network that a flow reaches.

    Plain: ``conv(feature + flow(source))``. Steered: the flow answers offsets and modulation,
    ``conv(feature, *split(flow(feature + source)))``. Without a flow: ``conv(feature)``.

    Args:
        conv: The receiving convolution with its activation.
        feature: Its input.
        source: What the flow reads: the regression feature of the same step.
        flow: The flow's convolution, or None.
        steered: Whether the receiving convolution is deformable.
        carried: ``flow(source)`` where it is already computed.

    Returns:
        Output of the convolution.
    """
    if flow is None:
        return conv(feature)
    if steered:
        return conv(feature, *split_steering(flow(feature + source)))
    return conv(feature + (flow(source) if carried is None else carried))


def forward_boxes(x: Tensor, nets: SubNetworks) -> Features:
    """Classification and regression on a level that has no stuff and mask sub-networks.

    ``r_i = W_reg r_{i-1}``, ``c_i = W_cls (c_{i-1} + F r_i)``: the flow reads the regression feature *after*
    its i-th convolution.
    """
    r = c = x
    for i, (reg, cls) in enumerate(zip(nets.reg, nets.cls, strict=True)):
        r = reg(r)
        c = receive(cls, c, r, _layer(nets.cls_flow, i), steered=i in nets.steered_cls)
    return Features(c, r, None, None)


def forward_all(x: Tensor, nets: SubNetworks, *, fuse: bool = False) -> Features:
    """All four sub-networks.

    The mask sub-network of J convolutions goes along the last J of the K steps; its j-th convolution receives
    the regression and the stuff features of that step.

    Args:
        x: Pyramid feature (N, C, H, W), the input of all four.
        nets: The layers.
        fuse: Run the flow convolutions that read one feature as a single one; same numbers.

    Returns:
        The last feature of each sub-network.

    Source: SpatialFlow, arXiv 1910.08787; order and combination as in the authors' release.
    """
    r = c = s = m = x
    first_mask_step = len(nets.reg) - len(nets.mask)
    for i, (reg, cls, stuff) in enumerate(zip(nets.reg, nets.cls, nets.stuff, strict=True)):
        r = reg(r)
        j = i - first_mask_step
        flows = {
            "cls": None if i in nets.steered_cls else _layer(nets.cls_flow, i),
            "stuff": None if i in nets.steered_stuff else _layer(nets.stuff_flow, i),
            "mask": None if j < 0 or j in nets.steered_mask else _layer(nets.mask_flow, j),
        }
        carried = _run_together(r, flows) if fuse else {}
        c = receive(
            cls, c, r, _layer(nets.cls_flow, i), steered=i in nets.steered_cls, carried=carried.get("cls")
        )
        s = receive(
            stuff,
            s,
            r,
            _layer(nets.stuff_flow, i),
            steered=i in nets.steered_stuff,
            carried=carried.get("stuff"),
        )
        if j < 0:
            continue
        path, flow = _layer(nets.stuff_mask_flow, j), _layer(nets.mask_flow, j)
        received = m if path is None else m + path(s)
        if j in nets.steered_mask and flow is not None:
            # Steered by the feature before the stuff path is added.
            m = nets.mask[j](received, *split_steering(flow(m + r)))
        else:
            m = receive(nets.mask[j], received, r, flow, carried=carried.get("mask"))
    return Features(c, r, s, m)


def _layer(layers: Sequence[nn.Module], i: int) -> nn.Module | None:
    return layers[i] if len(layers) else None


def _run_together(source: Tensor, flows: dict[str, nn.Module | None]) -> dict[str, Tensor]:
    """Answers of several 3x3 convolutions that read one feature, from one with their channels joined."""
    present: dict[str, Any] = {name: flow.conv for name, flow in flows.items() if flow is not None}
    if len(present) < 2:
        return {}
    weight = torch.cat([conv.weight for conv in present.values()])
    bias = torch.cat([conv.bias for conv in present.values()])
    out = F.conv2d(source, weight, bias, padding=1)
    sizes = [conv.out_channels for conv in present.values()]
    return dict(zip(present, out.split(sizes, dim=1), strict=True))
