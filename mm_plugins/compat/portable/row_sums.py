"""Weighted sums of feature rows: the primitive behind every sampling op, and the bilinear corners it reads.

A map of shape (N, C, H, W) is read as a table with one row of C values a pixel. Every sampled value is a
weighted sum of a few rows, which `torch.nn.functional.embedding_bag` computes without an intermediate tensor.
"""

# Shapes: N images, C channels, H x W pixels, R rows of a table, B sums, K rows in each sum.
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for half precision, else the dtype itself."""
    return torch.promote_types(dtype, torch.float32)


def pixel_rows(x_NCHW: Tensor) -> Tensor:
    """Map as a table (N*H*W, C) in at least fp32; row ``(n*H + y)*W + x``."""
    x_NCHW = x_NCHW.to(compute_dtype(x_NCHW.dtype))
    num_images, channels, height, width = x_NCHW.shape
    if x_NCHW.is_contiguous() and num_images:
        # A two-dimensional transpose takes PyTorch's blocked copy; the four-dimensional one is half as fast.
        rows = [x_CHW.flatten(1).t().contiguous() for x_CHW in x_NCHW]
        return rows[0] if num_images == 1 else torch.cat(rows)
    return x_NCHW.permute(0, 2, 3, 1).reshape(num_images * height * width, channels)


def rows_to_map(rows_RC: Tensor, num_images: int, height: int, width: int) -> Tensor:
    """Inverse of `pixel_rows`: view of shape (N, C, H, W)."""
    return rows_RC.view(num_images, height, width, rows_RC.shape[1]).permute(0, 3, 1, 2)


def add_rows_(map_NCHW: Tensor, rows_RC: Tensor) -> Tensor:
    """Add a table as `pixel_rows` makes it to a map, which is changed in place and returned."""
    for x_CHW, rows in zip(map_NCHW, rows_RC.view(len(map_NCHW), -1, rows_RC.shape[1]), strict=True):
        # Copy, then add: a transposed addition takes several times as long as PyTorch's blocked copy.
        x_CHW += rows.t().contiguous().view_as(x_CHW)
    return map_NCHW


def _by_image(pixels_U: Tensor, num_images: int, num_pixels: int) -> Iterator[tuple[int, slice, Tensor]]:
    """Image, slice of the sorted pixel numbers that belong to it, and their numbers within it."""
    edges = torch.arange(num_images + 1, device=pixels_U.device, dtype=pixels_U.dtype) * num_pixels
    ends = torch.searchsorted(pixels_U, edges).tolist()
    for image, part in enumerate(slice(*pair) for pair in pairwise(ends)):
        if part.start < part.stop:
            yield image, part, pixels_U[part] - image * num_pixels


def some_pixel_rows(x_NCHW: Tensor, pixels_U: Tensor) -> Tensor:
    """Rows of `pixel_rows` for a few sorted pixel numbers, shape (U, C)."""
    num_images, channels, height, width = x_NCHW.shape
    rows = [x_NCHW.new_zeros(0, channels)]
    for image, _, pixel in _by_image(pixels_U, num_images, height * width):
        rows.append(x_NCHW[image].flatten(1).index_select(1, pixel).t())
    return torch.cat(rows).to(compute_dtype(x_NCHW.dtype))


def add_pixel_rows_(map_NCHW: Tensor, rows_UC: Tensor, pixels_U: Tensor) -> Tensor:
    """Add rows to a few sorted pixels of a contiguous map, which is changed in place and returned."""
    num_images, channels, height, width = map_NCHW.shape
    for image, part, pixel in _by_image(pixels_U, num_images, height * width):
        map_NCHW[image].view(channels, -1).index_add_(1, pixel, rows_UC[part].t().to(map_NCHW.dtype))
    return map_NCHW


def weighted_row_sum(table_RC: Tensor, index_BK: Tensor, weight_BK: Tensor) -> Tensor:
    """``sum_k weight[b, k] * table[index[b, k]]``, shape (B, C); differentiable in table and weight."""
    if index_BK.numel() == 0 or table_RC.numel() == 0:
        # embedding_bag refuses an empty table; sums over nothing keep the result in the graph.
        return table_RC.new_zeros(len(index_BK), table_RC.shape[1]) + table_RC[:0].sum() + weight_BK[:0].sum()
    return F.embedding_bag(index_BK, table_RC, mode="sum", per_sample_weights=weight_BK)


def weighted_row_scatter(
    grad_BC: Tensor, index_E: Tensor, bag_E: Tensor, weight_E: Tensor, num_rows: int
) -> Tensor:
    """Adjoint of `weighted_row_sum`: row r sums ``weight[e] * grad[bag[e]]`` over entries with index[e] = r.

    Sorting the entries by row turns the scatter into another sum of rows: no atomics, one fixed order of
    addition.
    """
    if index_E.numel() == 0:
        return grad_BC.new_zeros(num_rows, grad_BC.shape[1])
    sorted_E, order_E = torch.sort(index_E, stable=True)
    starts = torch.searchsorted(
        sorted_E, torch.arange(num_rows, dtype=sorted_E.dtype, device=sorted_E.device)
    )
    return F.embedding_bag(
        bag_E[order_E], grad_BC, starts.to(bag_E.dtype), mode="sum", per_sample_weights=weight_E[order_E]
    )


def corners_zero_padded(y: Tensor, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Bilinear corners of points on a map that is zero outside (deformable convolution and attention).

    Args:
        y: Row coordinates in pixels, pixel centres at integers; any shape.
        x: Column coordinates of the same shape.
        height: Rows of the map.
        width: Columns of the map.

    Returns:
        Pixel index ``y*W + x`` (int32) and weight of the four corners, on a new last dimension. Points at or
        beyond one pixel outside weigh nothing, and get no gradient.
    """
    inside = (y > -1) & (y < height) & (x > -1) & (x < width)
    y, x = (torch.where(inside, v, 0) for v in (y, x))
    top, left = y.detach().floor(), x.detach().floor()
    down, right = y - top, x - left
    top, left = top.int(), left.int()
    y_ok = torch.stack(((top >= 0) & inside, (top + 1 < height) & inside), -1)
    x_ok = torch.stack((left >= 0, left + 1 < width), -1)
    y_weight = torch.stack((1 - down, down), -1) * y_ok
    x_weight = torch.stack((1 - right, right), -1) * x_ok
    rows = torch.stack((top.clamp(min=0), (top + 1).clamp(max=height - 1)), -1)
    columns = torch.stack((left.clamp(min=0), (left + 1).clamp(max=width - 1)), -1)
    return _outer(rows, columns, y_weight, x_weight, width)


def axis_corners(coord: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Linear neighbours on an axis that is clamped within one pixel outside and zero beyond (RoI pooling).

    Args:
        coord: Coordinates in pixels, pixel centres at integers; any shape.
        size: Pixels on the axis.

    Returns:
        Pixel number (int32) and weight of the two neighbours, on a new last dimension.
    """
    inside = (coord >= -1) & (coord <= size)
    coord = torch.where(inside, coord, 0).clamp(0, max(size - 1, 0))
    low = coord.detach().floor()
    fraction = coord - low
    low = low.int()
    weight = torch.stack((1 - fraction, fraction), -1) * inside[..., None]
    return torch.stack((low, (low + 1).clamp(max=max(size - 1, 0))), -1), weight


def corners_clamped(y: Tensor, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Bilinear corners with the border rule of `axis_corners`; returns as `corners_zero_padded`."""
    rows, y_weight = axis_corners(y, height)
    columns, x_weight = axis_corners(x, width)
    return _outer(rows, columns, y_weight, x_weight, width)


def _outer(
    rows: Tensor, columns: Tensor, y_weight: Tensor, x_weight: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    index = rows[..., :, None] * width + columns[..., None, :]
    weight = y_weight[..., :, None] * x_weight[..., None, :]
    return index.flatten(-2), weight.flatten(-2)
