"""RoIAlign and deformable RoI pooling: mean or maximum of bilinear samples in every bin of a region."""

# Shapes: N images, C channels, H x W pixels, R regions, P x Q bins of a region, g x h samples of a bin,
# E entries (one pixel of one sample each).
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mm_plugins.compat.portable.row_sums import (
    add_pixel_rows_,
    add_rows_,
    axis_corners,
    compute_dtype,
    corners_clamped,
    pixel_rows,
    some_pixel_rows,
    weighted_row_scatter,
    weighted_row_sum,
)

MAX_ENTRIES = 1 << 22
"""Upper bound of the sampled pixels listed at once, unless one region alone needs more."""

Pair = tuple[int, int]


class Regions(NamedTuple):
    """Regions in pixels of the feature map."""

    image_R: Tensor
    """Image numbers, int32."""
    x_R: Tensor
    """Left edges."""
    y_R: Tensor
    """Top edges."""
    width_R: Tensor
    """Widths."""
    height_R: Tensor
    """Heights."""
    samples_R2: Tensor
    """Samples of a bin (vertical, horizontal), int64; 0 means that the region is empty."""

    def subset(self, which: Tensor) -> "Regions":
        """The regions of the given numbers."""
        return Regions(*(v[which] for v in self))


def measure_regions(
    rois_R5: Tensor, *, output_size: Pair, spatial_scale: float, sampling_ratio: int, aligned: bool
) -> Regions:
    """Regions in feature pixels, and how many samples their bins get."""
    rois_R5 = rois_R5.detach().to(compute_dtype(rois_R5.dtype))
    x1, y1, x2, y2 = (rois_R5[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)).unbind(1)
    width, height = x2 - x1, y2 - y1
    if not aligned:
        width, height = width.clamp(min=1), height.clamp(min=1)
    if sampling_ratio > 0:
        samples = torch.full((len(rois_R5), 2), sampling_ratio, dtype=torch.int64, device=rois_R5.device)
    else:
        samples = torch.stack((height / output_size[0], width / output_size[1]), 1).ceil().long().clamp(min=0)
    return Regions(rois_R5[:, 0].int(), x1, y1, width, height, samples)


def _groups(regions: Regions, num_bins: int) -> Iterator[tuple[Tensor, Pair]]:
    """Numbers of regions with equally many samples, in chunks, without the empty ones."""
    pairs, group_R = torch.unique(regions.samples_R2, dim=0, return_inverse=True)
    for number, (g, h) in enumerate(pairs.tolist()):
        if g and h:
            chunk = max(1, MAX_ENTRIES // (4 * num_bins * g * h))
            for which in (group_R == number).nonzero().squeeze(1).split(chunk):
                yield which, (g, h)


def _axis_samples(start_R: Tensor, length_R: Tensor, num_bins: int, num_samples: int) -> Tensor:
    """Coordinates of the samples along one axis, shape (R, bins, samples)."""
    bin_R = (length_R / num_bins)[:, None, None]
    bins = torch.arange(num_bins, device=start_R.device, dtype=start_R.dtype)[:, None]
    centres = torch.arange(num_samples, device=start_R.device, dtype=start_R.dtype) + 0.5
    return start_R[:, None, None] + bins * bin_R + centres * bin_R / num_samples


def _sample_points(regions: Regions, output_size: Pair, samples: Pair) -> tuple[Tensor, Tensor]:
    """Sample coordinates y of shape (R, P, g) and x of shape (R, Q, h)."""
    y_RPg = _axis_samples(regions.y_R, regions.height_R, output_size[0], samples[0])
    x_RQh = _axis_samples(regions.x_R, regions.width_R, output_size[1], samples[1])
    return y_RPg, x_RQh


def _mean_entries(
    regions: Regions, output_size: Pair, samples: Pair, map_size: Pair
) -> tuple[Tensor, Tensor]:
    """Pixel numbers and weights whose sums are the means of the bins, each of shape (R*P*Q, g*h*4)."""
    y_RPg, x_RQh = _sample_points(regions, output_size, samples)
    rows, y_weight = (v.flatten(2) for v in axis_corners(y_RPg, map_size[0]))
    columns, x_weight = (v.flatten(2) for v in axis_corners(x_RQh, map_size[1]))
    rows = (rows + regions.image_R[:, None, None] * map_size[0]) * map_size[1]
    index = rows[:, :, None, :, None] + columns[:, None, :, None, :]
    y_weight = y_weight / (samples[0] * samples[1])
    weight = y_weight[:, :, None, :, None] * x_weight[:, None, :, None, :]
    num_sums = len(rows) * output_size[0] * output_size[1]
    return index.view(num_sums, -1), weight.view(num_sums, -1)


def _is_sparse(groups: list[tuple[Tensor, Pair]], num_bins: int, input_NCHW: Tensor) -> bool:
    """Whether reading the few sampled pixels one by one beats turning the whole map into rows."""
    if input_NCHW.device.type != "cpu" or not input_NCHW.is_contiguous():
        return False
    num_images, channels, height, width = input_NCHW.shape
    num_entries = sum(len(which) * num_bins * 4 * g * h for which, (g, h) in groups)
    # Measured in ns on one core: 100 to find a pixel, 1.4 to read a value out of order, 3 to copy one.
    return num_entries * (100 + 1.4 * channels) < 3 * num_images * height * width * channels


def _in_order(
    sums: list[Tensor], groups: list[tuple[Tensor, Pair]], table_RC: Tensor, shape: tuple[int, int, int]
) -> Tensor:
    """Sums of the groups put back in the order of the regions, shape (R, P*Q, C); zeros for empty regions."""
    # A sum over no rows is 0 and keeps the result in the graph when every region is empty.
    pooled = table_RC.new_zeros(shape) + table_RC[:0].sum()
    if not groups:
        return pooled
    return pooled.index_copy(
        0, torch.cat([which for which, _ in groups]), torch.cat(sums).view(-1, *shape[1:])
    )


def roi_align(
    input_NCHW: Tensor,
    rois_R5: Tensor,
    *,
    output_size: Pair,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """Mean of bilinear samples in every bin of every region.

    Args:
        input_NCHW: Feature map; receives the gradient.
        rois_R5: Regions (image number, x1, y1, x2, y2) in pixels of the picture; no gradient.
        output_size: Bins (P, Q).
        spatial_scale: Feature pixels per picture pixel.
        sampling_ratio: Samples of a bin along each axis; 0 takes one for each feature pixel, rounded up.
        aligned: Pixel centres lie at half-integers; else at integers, and regions are at least one pixel
            wide.

    Returns:
        Tensor of shape (R, C, P, Q) in the dtype of the input; half precision is summed in fp32. Regions
        without extent give zeros.

    Source: Mask R-CNN, arXiv 1703.06870, section 3; ``aligned`` as in Detectron2.
    """
    channels, map_size = input_NCHW.shape[1], (input_NCHW.shape[2], input_NCHW.shape[3])
    num_bins = output_size[0] * output_size[1]
    regions = measure_regions(
        rois_R5,
        output_size=output_size,
        spatial_scale=spatial_scale,
        sampling_ratio=sampling_ratio,
        aligned=aligned,
    )
    groups = list(_groups(regions, num_bins))
    pixels = None
    if _is_sparse(groups, num_bins, input_NCHW):
        entries = [_mean_entries(regions.subset(which), output_size, g, map_size)[0] for which, g in groups]
        pixels = torch.cat([regions.image_R[:0], *(index.flatten() for index in entries)]).unique()
    table = pixel_rows(input_NCHW) if pixels is None else some_pixel_rows(input_NCHW, pixels)
    sums = []
    for which, samples in groups:
        index, weight = _mean_entries(regions.subset(which), output_size, samples, map_size)
        if pixels is not None:
            index = torch.searchsorted(pixels, index)
        sums.append(weighted_row_sum(table, index, weight.to(table.dtype)))
    pooled = _in_order(sums, groups, table, (len(rois_R5), num_bins, channels))
    return pooled.transpose(1, 2).reshape(len(rois_R5), channels, *output_size).to(input_NCHW.dtype)


def add_roi_align_grad_(
    grad_NCHW: Tensor,
    grad_RCPQ: Tensor,
    rois_R5: Tensor,
    *,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """Add the gradient of `roi_align` by its input, which needs no values of that input.

    Args:
        grad_NCHW: Gradient by the input, contiguous; changed in place.
        grad_RCPQ: Gradient by the output.
        rois_R5: Regions, as in `roi_align`.
        spatial_scale: As there.
        sampling_ratio: As there.
        aligned: As there.

    Returns:
        ``grad_NCHW``. Sums are taken in at least fp32.
    """
    num_images, channels, height, width = grad_NCHW.shape
    output_size = (grad_RCPQ.shape[2], grad_RCPQ.shape[3])
    num_bins = output_size[0] * output_size[1]
    regions = measure_regions(
        rois_R5,
        output_size=output_size,
        spatial_scale=spatial_scale,
        sampling_ratio=sampling_ratio,
        aligned=aligned,
    )
    grad_BC = grad_RCPQ.to(compute_dtype(grad_RCPQ.dtype)).flatten(2).transpose(1, 2).reshape(-1, channels)
    bins = torch.arange(num_bins, device=grad_BC.device, dtype=torch.int32)
    indices, bags, weights = [bins[:0]], [bins[:0]], [grad_BC.new_zeros(0)]
    groups = list(_groups(regions, num_bins))
    for which, samples in groups:
        index, weight = _mean_entries(regions.subset(which), output_size, samples, (height, width))
        bag = (which.int()[:, None] * num_bins + bins).view(-1, 1).expand_as(index)
        indices.append(index.flatten())
        bags.append(bag.flatten())
        weights.append(weight.flatten().to(grad_BC.dtype))
    index, bag, weight = torch.cat(indices), torch.cat(bags), torch.cat(weights)
    if _is_sparse(groups, num_bins, grad_NCHW):
        pixels, index = index.unique(return_inverse=True)
        rows = weighted_row_scatter(grad_BC, index.int(), bag, weight, len(pixels))
        return add_pixel_rows_(grad_NCHW, rows, pixels)
    rows = weighted_row_scatter(grad_BC, index, bag, weight, num_images * height * width)
    return add_rows_(grad_NCHW, rows)


class MaxPooled(NamedTuple):
    """Maxima of the bins and where they were sampled."""

    value: Tensor
    """Maxima, shape (R, C, P, Q)."""
    y: Tensor
    """Row coordinate of the maximum in feature pixels; -1 in empty regions."""
    x: Tensor
    """Column coordinate of the maximum; -1 in empty regions."""


def roi_align_max(
    input_NCHW: Tensor,
    rois_R5: Tensor,
    *,
    output_size: Pair,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> MaxPooled:
    """Maximum of bilinear samples in every bin; arguments as in `roi_align`. Empty regions give zeros."""
    channels, map_size = input_NCHW.shape[1], (input_NCHW.shape[2], input_NCHW.shape[3])
    regions = measure_regions(
        rois_R5,
        output_size=output_size,
        spatial_scale=spatial_scale,
        sampling_ratio=sampling_ratio,
        aligned=aligned,
    )
    table = pixel_rows(input_NCHW)
    shape = (len(rois_R5), channels, *output_size)
    pooled = MaxPooled(table.new_zeros(shape), table.new_full(shape, -1), table.new_full(shape, -1))
    for which, samples in _groups(regions, output_size[0] * output_size[1]):
        subset = regions.subset(which)
        y_RPg, x_RQh = _sample_points(subset, output_size, samples)
        y, x = torch.broadcast_tensors(y_RPg[:, :, None, :, None], x_RQh[:, None, :, None, :])
        index, weight = corners_clamped(y, x, *map_size)
        index = index + (subset.image_R * (map_size[0] * map_size[1])).view(-1, 1, 1, 1, 1, 1)
        values = weighted_row_sum(table, index.view(-1, 4), weight.view(-1, 4).to(table.dtype))
        best, place = values.view(*y.shape[:3], -1, channels).max(3)
        pooled.value[which] = best.permute(0, 3, 1, 2)
        for target, coord in ((pooled.y, y), (pooled.x, x)):
            target[which] = coord.flatten(3).gather(3, place).permute(0, 3, 1, 2).to(target.dtype)
    return MaxPooled(pooled.value.to(input_NCHW.dtype), pooled.y, pooled.x)


def roi_align_max_adjoint(
    grad_RCPQ: Tensor, rois_R5: Tensor, y: Tensor, x: Tensor, *, input_shape: tuple[int, int, int, int]
) -> Tensor:
    """Gradient of `roi_align_max` by its input: each bin's gradient goes to the corners of its maximum.

    Args:
        grad_RCPQ: Gradient by the maxima.
        rois_R5: Regions, for their image numbers.
        y: Row coordinates of the maxima.
        x: Column coordinates of the maxima.
        input_shape: Shape (N, C, H, W) of the input.

    Returns:
        Gradient of that shape, at least fp32.
    """
    num_images, channels, height, width = input_shape
    index, weight = corners_clamped(y, x, height, width)
    weight = weight * ((y != -1) & (x != -1))[..., None]
    channel = torch.arange(channels, device=index.device).view(1, -1, 1, 1, 1)
    plane = rois_R5[:, 0].long().view(-1, 1, 1, 1, 1) * channels + channel
    flat = (plane * (height * width) + index).flatten()
    grad = grad_RCPQ.to(compute_dtype(grad_RCPQ.dtype))[..., None] * weight
    zeros = grad.new_zeros(num_images * channels * height * width)
    return zeros.scatter_add_(0, flat, grad.flatten().to(zeros.dtype)).view(input_shape)


def deform_roi_pool(
    input_NCHW: Tensor,
    rois_R5: Tensor,
    offset_R2PQ: Tensor | None,
    *,
    output_size: Pair,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
) -> Tensor:
    """`roi_align` (aligned) whose bins are displaced by ``gamma * size of the region * offset``.

    Args:
        input_NCHW: Feature map; receives a gradient.
        rois_R5: Regions (image number, x1, y1, x2, y2) in pixels of the picture; no gradient.
        offset_R2PQ: Displacements (x, y) of every bin as shares of the region, or None for 0; receives a
            gradient.
        output_size: Bins (P, Q).
        spatial_scale: Feature pixels per picture pixel.
        sampling_ratio: Samples of a bin along each axis; 0 takes one for each feature pixel, rounded up.
        gamma: Scale of the displacements.

    Returns:
        Tensor of shape (R, C, P, Q) in the dtype of the input.

    Source: Deformable ConvNets, arXiv 1703.06211, section 2.2.
    """
    channels, map_size = input_NCHW.shape[1], (input_NCHW.shape[2], input_NCHW.shape[3])
    regions = measure_regions(
        rois_R5,
        output_size=output_size,
        spatial_scale=spatial_scale,
        sampling_ratio=sampling_ratio,
        aligned=True,
    )
    num_bins = output_size[0] * output_size[1]
    table = pixel_rows(input_NCHW)
    groups = list(_groups(regions, num_bins))
    all_sums = []
    for which, samples in groups:
        subset = regions.subset(which)
        y_RPg, x_RQh = _sample_points(subset, output_size, samples)
        y, x = torch.broadcast_tensors(y_RPg[:, :, None, :, None], x_RQh[:, None, :, None, :])
        if offset_R2PQ is not None:
            shift = gamma * offset_R2PQ[which].to(table.dtype)[..., None, None]
            x = x + subset.width_R.view(-1, 1, 1, 1, 1) * shift[:, 0]
            y = y + subset.height_R.view(-1, 1, 1, 1, 1) * shift[:, 1]
        index, weight = corners_clamped(y, x, *map_size)
        index = index + (subset.image_R * (map_size[0] * map_size[1])).view(-1, 1, 1, 1, 1, 1)
        num_sums = len(which) * num_bins
        weight = weight.reshape(num_sums, -1).to(table.dtype) / (samples[0] * samples[1])
        all_sums.append(weighted_row_sum(table, index.reshape(num_sums, -1), weight))
    pooled = _in_order(all_sums, groups, table, (len(rois_R5), num_bins, channels))
    return pooled.transpose(1, 2).reshape(len(rois_R5), channels, *output_size).to(input_NCHW.dtype)
