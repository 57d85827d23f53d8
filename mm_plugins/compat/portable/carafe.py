"""CARAFE: upsampling by kernels that are predicted for every output pixel."""

# Shapes: N images, C channels, H x W pixels, Y x X = sH x sW output pixels, G groups, K = k*k taps.
import torch
from torch import Tensor

from mm_plugins.compat.portable.row_sums import compute_dtype, pixel_rows, rows_to_map, weighted_row_sum


def _neighbours(size: int, kernel_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Clamped neighbour numbers and whether they exist, along one axis, each of shape (size, kernel_size)."""
    steps = torch.arange(kernel_size, device=device, dtype=torch.int32) - (kernel_size - 1) // 2
    place = torch.arange(size, device=device, dtype=torch.int32)[:, None] + steps
    return place.clamp(0, size - 1), (place >= 0) & (place < size)


def carafe(
    features_NCHW: Tensor, masks: Tensor, *, kernel_size: int, group_size: int, scale_factor: int
) -> Tensor:
    """Every output pixel is a weighted sum of the k x k neighbourhood of the pixel it came from.

    Args:
        features_NCHW: Low-resolution map.
        masks: Kernels of shape (N, G*k*k, s*H, s*W), usually softmax-normalised over k*k.
        kernel_size: k, odd.
        group_size: Groups of channels G with kernels of their own.
        scale_factor: s, integer.

    Returns:
        Map of shape (N, C, s*H, s*W) in the dtype of the features; half precision is summed in fp32.

    Source: CARAFE, arXiv 1905.02188, Eq. (4); zeros outside the map.
    """
    num_images, channels, height, width = features_NCHW.shape
    device = features_NCHW.device
    rows_HK, row_ok = _neighbours(height, kernel_size, device)
    columns_WK, column_ok = _neighbours(width, kernel_size, device)
    index_HWK = (rows_HK[:, None, :, None] * width + columns_WK[None, :, None, :]).flatten(2)
    ok_HWK = (row_ok[:, None, :, None] & column_ok[None, :, None, :]).flatten(2)
    index_YXK, ok_YXK = (
        v.repeat_interleave(scale_factor, 0).repeat_interleave(scale_factor, 1) for v in (index_HWK, ok_HWK)
    )
    image = torch.arange(num_images, device=device, dtype=torch.int32).view(-1, 1, 1, 1, 1) * (height * width)
    group = torch.arange(group_size, device=device, dtype=torch.int32)[:, None]
    index = (index_YXK[None, :, :, None, :] + image) * group_size + group
    weight = (
        masks.to(compute_dtype(features_NCHW.dtype)).unflatten(1, (group_size, -1)).permute(0, 3, 4, 1, 2)
    )
    weight = weight * ok_YXK[:, :, None, :]
    num_taps = kernel_size * kernel_size
    table = pixel_rows(features_NCHW).view(-1, channels // group_size)
    sums = weighted_row_sum(table, index.reshape(-1, num_taps), weight.reshape(-1, num_taps))
    out = rows_to_map(sums.view(-1, channels), num_images, height * scale_factor, width * scale_factor)
    return out.to(features_NCHW.dtype)
