"""Multi-scale deformable attention."""

# Shapes: N images, V pixels of all levels, M heads, D channels of a head, Q queries, L levels,
# P points of a level.
import torch
from torch import Tensor

from mm_plugins.compat.portable.row_sums import compute_dtype, corners_zero_padded, weighted_row_sum


def ms_deform_attn(
    value_NVMD: Tensor,
    spatial_shapes_L2: Tensor,
    level_start_L: Tensor,
    locations_NQMLP2: Tensor,
    weights_NQMLP: Tensor,
) -> Tensor:
    """Sum over levels and points of attention weight times the bilinearly sampled value.

    Args:
        value_NVMD: Values of all levels, one after the other.
        spatial_shapes_L2: Height and width of every level.
        level_start_L: First pixel of every level in V.
        locations_NQMLP2: Sampling points (x, y) as shares of the level's width and height; pixel centres lie
            at ``(i + 0.5) / size``, values outside are zero.
        weights_NQMLP: Attention weights.

    Returns:
        Tensor of shape (N, Q, M*D) in the dtype of the value; half precision is summed in fp32.

    Source: Deformable DETR, arXiv 2010.04159, Eq. (3).
    """
    num_images, num_pixels, num_heads, dim = value_NVMD.shape
    num_queries = locations_NQMLP2.shape[1]
    dtype = compute_dtype(value_NVMD.dtype)
    locations, weights = locations_NQMLP2.to(dtype), weights_NQMLP.to(dtype)
    image = (
        torch.arange(num_images, device=locations.device, dtype=torch.int32).view(-1, 1, 1, 1, 1) * num_pixels
    )
    head = torch.arange(num_heads, device=locations.device, dtype=torch.int32).view(-1, 1, 1)
    indices, corner_weights = [], []
    levels = zip(spatial_shapes_L2.tolist(), level_start_L.tolist(), strict=True)
    for level, ((height, width), start) in enumerate(levels):
        x, y = locations[:, :, :, level].unbind(-1)
        index, weight = corners_zero_padded(y * height - 0.5, x * width - 0.5, height, width)
        indices.append((index + start + image) * num_heads + head)
        corner_weights.append(weight * weights[:, :, :, level, :, None])
    num_entries = 4 * weights.shape[3] * weights.shape[4]
    index_BK = torch.stack(indices, 3).reshape(-1, num_entries)
    weight_BK = torch.stack(corner_weights, 3).reshape(-1, num_entries)
    table = value_NVMD.to(dtype).reshape(-1, dim)
    return (
        weighted_row_sum(table, index_BK, weight_BK)
        .view(num_images, num_queries, num_heads * dim)
        .to(value_NVMD.dtype)
    )
