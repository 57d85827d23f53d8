"""RoI max pooling over whole pixels."""

# Shapes: N images, C channels, H x W pixels, R regions, P x Q bins of a region.
import torch
from torch import Tensor

from mm_plugins.compat.portable.row_sums import compute_dtype

MAX_VALUES = 1 << 24
"""Upper bound of the gathered values held at once, unless one region alone needs more."""


def _bin_edges(start_R: Tensor, length_R: Tensor, num_bins: int, size: int) -> tuple[Tensor, Tensor]:
    """First pixel and first pixel after every bin, clipped to the map, each of shape (R, bins)."""
    bin_R = (length_R / num_bins)[:, None]
    bins = torch.arange(num_bins, device=start_R.device, dtype=start_R.dtype)
    first = (bins * bin_R + start_R[:, None]).floor().clamp(0, size)
    last = ((bins + 1) * bin_R + start_R[:, None]).ceil().clamp(0, size)
    return first.long(), last.long()


def _bin_pixels(first_RB: Tensor, last_RB: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels of every bin padded to the widest one, and which are real; each (R, bins, pixels)."""
    widest = max(int((last_RB - first_RB).max()), 1)
    pixel = first_RB[..., None] + torch.arange(widest, device=first_RB.device)
    return pixel, pixel < last_RB[..., None]


def roi_pool(
    input_NCHW: Tensor, rois_R5: Tensor, *, output_size: tuple[int, int], spatial_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Maximum of the pixels in every bin of every region.

    A region covers ``[x1, x2 + 1) * spatial_scale``; a bin's edges are rounded outwards, so that bins may
    overlap.

    Args:
        input_NCHW: Feature map.
        rois_R5: Regions (image number, x1, y1, x2, y2) in pixels of the picture.
        output_size: Bins (P, Q).
        spatial_scale: Feature pixels per picture pixel.

    Returns:
        Maxima of shape (R, C, P, Q), 0 in empty bins, and the pixel ``y*W + x`` of each (int32), -1 in empty
        bins.

    Source: Fast R-CNN, arXiv 1504.08083, section 2.1; edges as in mmcv, without rounding the region first.
    """
    num_images, channels, height, width = input_NCHW.shape
    rois = rois_R5.detach().to(compute_dtype(rois_R5.dtype))
    x1, y1 = rois[:, 1] * spatial_scale, rois[:, 2] * spatial_scale
    box_w, box_h = (rois[:, 3] + 1) * spatial_scale - x1, (rois[:, 4] + 1) * spatial_scale - y1
    top, bottom = _bin_edges(y1, box_h, output_size[0], height)
    left, right = _bin_edges(x1, box_w, output_size[1], width)
    # A region turned inside out has no bins at all.
    proper = ((box_w > 0) & (box_h > 0))[:, None]
    bottom, right = torch.where(proper, bottom, top), torch.where(proper, right, left)
    value = input_NCHW.new_zeros(len(rois), channels, *output_size)
    argmax = torch.full_like(value, -1, dtype=torch.int32)
    if not len(rois):
        return value, argmax
    table = input_NCHW.permute(0, 2, 3, 1).reshape(-1, channels)
    per_region = output_size[0] * output_size[1] * channels
    largest = max(int((bottom - top).max()) * int((right - left).max()), 1)
    for which in torch.arange(len(rois), device=rois.device).split(
        max(1, MAX_VALUES // (per_region * largest))
    ):
        y, y_ok = _bin_pixels(top[which], bottom[which])
        x, x_ok = _bin_pixels(left[which], right[which])
        pixel = (y.clamp(max=height - 1) * width)[:, :, None, :, None] + x.clamp(max=width - 1)[
            :, None, :, None, :
        ]
        pixel = pixel.flatten(3)
        ok = (y_ok[:, :, None, :, None] & x_ok[:, None, :, None, :]).flatten(3)
        image = rois[which, 0].long().view(-1, 1, 1, 1) * (height * width)
        values = table.index_select(0, (pixel + image).flatten()).view(*pixel.shape, channels)
        best, place = values.masked_fill(~ok[..., None], -torch.inf).max(3)
        filled = ok.any(3)[..., None]
        value[which] = torch.where(filled, best, 0).permute(0, 3, 1, 2)
        argmax[which] = torch.where(filled, pixel.gather(3, place), -1).permute(0, 3, 1, 2).int()
    return value, argmax


def roi_pool_adjoint(
    grad_RCPQ: Tensor, rois_R5: Tensor, argmax_RCPQ: Tensor, *, input_shape: tuple[int, int, int, int]
) -> Tensor:
    """Gradient of `roi_pool` by its input: every bin's gradient goes to its maximum; shape and dtype follow.

    Args:
        grad_RCPQ: Gradient by the maxima.
        rois_R5: Regions, for their image numbers.
        argmax_RCPQ: Pixels of the maxima, -1 for none.
        input_shape: Shape (N, C, H, W) of the input.

    Returns:
        Gradient of that shape, at least fp32.
    """
    num_images, channels, height, width = input_shape
    channel = torch.arange(channels, device=argmax_RCPQ.device).view(1, -1, 1, 1)
    plane = rois_R5[:, 0].long().view(-1, 1, 1, 1) * channels + channel
    flat = plane * (height * width) + argmax_RCPQ.clamp(min=0)
    grad = torch.where(argmax_RCPQ >= 0, grad_RCPQ.to(compute_dtype(grad_RCPQ.dtype)), 0)
    zeros = grad.new_zeros(num_images * channels * height * width)
    return zeros.scatter_add_(0, flat.flatten(), grad.flatten()).view(input_shape)
