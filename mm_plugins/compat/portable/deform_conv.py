"""Deformable convolution, with and without modulation."""

# Shapes: N images, C input and O output channels, H x W input and P x Q output pixels, L = P*Q,
# K taps of the kernel, D deformable groups, G convolution groups, S = 2*K*D offset channels.
import torch
from torch import Tensor

from mm_plugins.compat.portable.row_sums import (
    compute_dtype,
    corners_zero_padded,
    pixel_rows,
    weighted_row_sum,
)

MAX_COLUMN_ELEMENTS = 1 << 26
"""Upper bound of the sampled values held at once (256 MiB in fp32), unless one image alone needs more."""

Pair = tuple[int, int]


def images_per_chunk(num_positions: int, num_taps: int, channels: int) -> int:
    """How many images are sampled at once."""
    return max(1, MAX_COLUMN_ELEMENTS // max(1, num_positions * num_taps * channels))


def _tap_grid(height: int, kernel: int, stride: int, padding: int, dilation: int, like: Tensor) -> Tensor:
    """Undeformed coordinate of every output position and tap along one axis, shape (positions, taps)."""
    size = (height + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    start = torch.arange(size, device=like.device, dtype=like.dtype) * stride - padding
    return start[:, None] + torch.arange(kernel, device=like.device, dtype=like.dtype) * dilation


def sampled_columns(
    input_NCHW: Tensor,
    offset_NSPQ: Tensor,
    mask: Tensor | None,
    *,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    deform_groups: int,
) -> Tensor:
    """Values under the displaced taps of every output position, shape (N*L, K, C).

    Args:
        input_NCHW: Feature map.
        offset_NSPQ: Displacements in pixels; channels are (group, tap, (dy, dx)).
        mask: Factor of every tap, shape (N, D*K, P, Q), or None for 1.
        kernel_size: Taps (rows, columns).
        stride: Step of the output positions in pixels.
        padding: Zeros around the map in pixels.
        dilation: Distance of the taps in pixels.
        deform_groups: Groups of channels with displacements of their own.

    Returns:
        Sampled values in at least fp32.
    """
    num_images, channels, height, width = input_NCHW.shape
    (kernel_h, kernel_w), num_taps = kernel_size, kernel_size[0] * kernel_size[1]
    offset = offset_NSPQ.to(compute_dtype(offset_NSPQ.dtype))
    out_h, out_w = offset.shape[2:]
    y_PK = _tap_grid(height, kernel_h, stride[0], padding[0], dilation[0], offset)
    x_QK = _tap_grid(width, kernel_w, stride[1], padding[1], dilation[1], offset)
    if (out_h, out_w) != (len(y_PK), len(x_QK)):
        raise ValueError(
            f"offset must have one displacement for each output position {len(y_PK)} x {len(x_QK)}; got "
            f"{out_h} x {out_w}. Compute it with the kernel size, stride, padding and dilation of this layer."
        )
    # (N, P, Q, rows, columns, D, 2): position, then tap, then group, as the rows of the table are laid out.
    offset = offset.view(num_images, deform_groups, kernel_h, kernel_w, 2, out_h, out_w).permute(
        0, 5, 6, 2, 3, 1, 4
    )
    y = offset[..., 0] + y_PK[:, None, :, None, None]
    x = offset[..., 1] + x_QK[None, :, None, :, None]
    index, weight = corners_zero_padded(y, x, height, width)
    if mask is not None:
        mask = mask.to(weight.dtype).view(num_images, deform_groups, kernel_h, kernel_w, out_h, out_w)
        weight = weight * mask.permute(0, 4, 5, 2, 3, 1).unsqueeze(-1)
    # Row (n*H*W + pixel) * D + group of a table whose rows hold the channels of one group.
    image = torch.arange(num_images, device=index.device, dtype=index.dtype) * (height * width)
    group = torch.arange(deform_groups, device=index.device, dtype=index.dtype)
    index = (index + image.view(-1, 1, 1, 1, 1, 1, 1)) * deform_groups + group[:, None]
    table = pixel_rows(input_NCHW).view(-1, channels // deform_groups)
    sums = weighted_row_sum(table, index.view(-1, 4), weight.reshape(-1, 4).to(table.dtype))
    return sums.view(num_images * out_h * out_w, num_taps, channels)


def leading_entries(values_NSHW: Tensor, out_size: Pair) -> Tensor:
    """The part of an offset or mask that mmcv's compiled version 2 reads when it is larger than the output.

    mmcv takes the memory of each image as if it had the output's height and width, and so reads its first
    ``S * P * Q`` entries. DyHead passes the offsets of a finer level to a coarser one, and its published
    weights were trained with that reading.

    Args:
        values_NSHW: Offset or mask (N, S, H, W).
        out_size: Height P and width Q of the output.

    Returns:
        (N, S, P, Q); the tensor itself if the sizes agree or it is too small (which the caller refuses).
    """
    num_images, num_values = values_NSHW.shape[:2]
    needed = num_values * out_size[0] * out_size[1]
    if tuple(values_NSHW.shape[2:]) == tuple(out_size) or values_NSHW[0].numel() < needed:
        return values_NSHW
    return values_NSHW.flatten(1)[:, :needed].reshape(num_images, num_values, *out_size)


def deform_conv2d(
    input_NCHW: Tensor,
    offset_NSPQ: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias_O: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    deform_groups: int = 1,
) -> Tensor:
    """Convolution whose taps are displaced by ``offset`` and scaled by ``mask``.

    ``out(p) = sum_k weight_k * mask_k(p) * input(p + p_k + offset_k(p))``, bilinear, zero outside.

    Args:
        input_NCHW: Feature map.
        offset_NSPQ: Displacements in pixels, shape (N, 2*K*D, P, Q); channels are (group, tap, (dy, dx)).
        mask: Factors of shape (N, K*D, P, Q) (version 2), or None (version 1).
        weight: Kernel of shape (O, C/G, rows, columns).
        bias_O: Added to the output, or None.
        stride: Step of the output positions in pixels.
        padding: Zeros around the map in pixels.
        dilation: Distance of the taps in pixels.
        groups: Convolution groups G.
        deform_groups: Groups of channels with displacements of their own, D.

    Returns:
        Map of shape (N, O, P, Q) in the dtype of the input; half precision is sampled and summed in fp32.

    Raises:
        ValueError: If the channels do not fit the groups, or the offset does not fit the output.

    Source: Deformable ConvNets, arXiv 1703.06211; version 2, arXiv 1811.11168.
    """
    num_images, channels = input_NCHW.shape[:2]
    if channels % deform_groups or channels != weight.shape[1] * groups:
        raise ValueError(
            f"input has {channels} channels; weight asks for {weight.shape[1]} x groups={groups}, and "
            f"deform_groups={deform_groups} must divide them. Change in_channels, groups or deform_groups."
        )
    columns_BKC = sampled_columns(
        input_NCHW,
        offset_NSPQ,
        mask,
        kernel_size=(weight.shape[2], weight.shape[3]),
        stride=stride,
        padding=padding,
        dilation=dilation,
        deform_groups=deform_groups,
    )
    # Kernel as (G, K*C/G, O/G), in the order (tap, channel) of the columns.
    kernel = (
        weight.to(columns_BKC.dtype).unflatten(0, (groups, -1)).flatten(3).permute(0, 3, 2, 1).flatten(1, 2)
    )
    if groups == 1:
        out_BO = columns_BKC.flatten(1) @ kernel[0]
    else:
        columns_GBX = columns_BKC.unflatten(2, (groups, -1)).permute(2, 0, 1, 3).flatten(2)
        out_BO = (columns_GBX @ kernel).transpose(0, 1).flatten(1)
    if bias_O is not None:
        out_BO = out_BO + bias_O
    out_h, out_w = offset_NSPQ.shape[2:]
    return out_BO.view(num_images, out_h, out_w, len(weight)).permute(0, 3, 1, 2).to(input_NCHW.dtype)
