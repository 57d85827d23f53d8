"""Cross entropy of the enlarged logits without ever holding them: made, used and dropped piece by piece."""

# Shapes: N images, C classes, Y x X low-resolution cells, H x W output pixels, L pixels of one piece.
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mm_plugins.lau.location_loss import two_sided
from mm_plugins.lau.sampling import (
    Backend,
    BaseGrid,
    BorderGradient,
    Taps,
    add_scattered,
    cell_rows,
    chunk_length,
    coordinate_gradient,
    find_taps,
    limit_at_border,
    load_kernels,
    mix_rows,
    rows_to_map,
    sampling_coordinates,
    weight_gradient,
)

FUSED_BACKENDS = ("auto", "rows", "triton")


def _pieces(taps: Taps, label_NP: Tensor, num_cells: int, length: int) -> Iterator[tuple[int, slice, Taps]]:
    """Image, slice of its flattened pixels, and the taps of these, for all pixels."""
    num_images, num_pixels = label_NP.shape
    for index in range(num_images):
        for start in range(0, num_pixels, length):
            part = slice(start, min(start + length, num_pixels))
            yield index, part, taps.piece(index, start, length, num_pixels, num_cells)


class _SampledCrossEntropy(torch.autograd.Function):
    """Keeps the inputs and one number a pixel, the log-sum-exp; recomputes the rest in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NCYX: Tensor,
        offset_N2HW: Tensor,
        label_NHW: Tensor,
        scale: tuple[int, int],
        base_grid: BaseGrid,
        border_gradient: BorderGradient,
        ignore_index: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.options = (scale, base_grid, border_gradient, ignore_index)
        num_images, num_classes, num_rows, num_columns = x_NCYX.shape
        coordinates = sampling_coordinates(offset_N2HW, num_rows, num_columns, scale, base_grid)
        taps = find_taps(*coordinates, num_rows, num_columns)
        table_NKC = cell_rows(x_NCYX, 1).view(num_images, -1, num_classes)
        label_NP = label_NHW.flatten(1)
        loss_NP, log_sum_NP = table_NKC.new_zeros(label_NP.shape), table_NKC.new_empty(label_NP.shape)
        right_NP = torch.zeros_like(label_NP, dtype=torch.bool)
        # About 1 MB of values: four passes over them follow, and no sum over cells has to be paid for.
        length = max(2**18 // num_classes, 1024)
        for index, part, piece in _pieces(taps, label_NP, num_rows * num_columns, length):
            rows_LC, label_L = mix_rows(table_NKC[index], piece), label_NP[index, part]
            valid_L = label_L != ignore_index
            score_L = rows_LC.gather(1, label_L.where(valid_L, 0)[:, None])[:, 0]
            # logsumexp by hand: the maximum also tells whether the label wins, and argmax is slow.
            highest_L = rows_LC.amax(1)
            log_sum_L = rows_LC.sub_(highest_L[:, None]).exp_().sum(1).log_().add_(highest_L)
            log_sum_NP[index, part] = log_sum_L
            loss_NP[index, part] = (log_sum_L - score_L).where(valid_L, 0)
            right_NP[index, part] = valid_L & (score_L >= highest_L)
        ctx.save_for_backward(x_NCYX, offset_N2HW, label_NHW, log_sum_NP)
        right_NHW = right_NP.view_as(label_NHW)
        ctx.mark_non_differentiable(right_NHW)
        return loss_NP.view(label_NHW.shape), right_NHW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NHW: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x_NCYX, offset_N2HW, label_NHW, log_sum_NP = ctx.saved_tensors
        scale, base_grid, border_gradient, ignore_index = ctx.options
        num_images, num_classes, num_rows, num_columns = x_NCYX.shape
        sy_N1HW, sx_N1HW = sampling_coordinates(offset_N2HW, num_rows, num_columns, scale, base_grid)
        taps = find_taps(sy_N1HW, sx_N1HW, num_rows, num_columns)
        table_NKC = cell_rows(x_NCYX, 1).view(num_images, -1, num_classes)
        total_NYXC = table_NKC.new_zeros(num_images, num_rows, num_columns, num_classes)
        label_NP, grad_NP = label_NHW.flatten(1), grad_NHW.flatten(1)
        weight_grads = []
        num_cells = num_rows * num_columns
        length = chunk_length(num_classes, num_cells)
        for index, part, piece in _pieces(taps, label_NP, num_cells, length):
            label_L = label_NP[index, part]
            valid_L = label_L != ignore_index
            # d loss / d row = softmax - one-hot, times the pixel's own factor; exactly 0 where ignored.
            grad_LC = mix_rows(table_NKC[index], piece)
            grad_LC.sub_(log_sum_NP[index, part, None]).exp_()
            grad_LC.scatter_add_(
                1, label_L.where(valid_L, 0)[:, None], grad_LC.new_full((len(label_L), 1), -1)
            )
            grad_LC *= grad_NP[index, part].where(valid_L, 0)[:, None]
            if ctx.needs_input_grad[0]:
                add_scattered(total_NYXC[index], grad_LC, piece)
            if ctx.needs_input_grad[1]:
                weight_grads.append(weight_gradient(table_NKC[index], piece, grad_LC))
        grad_x = grad_offset = None
        if ctx.needs_input_grad[0]:
            grad_x = rows_to_map(total_NYXC.flatten(0, 2), tuple(x_NCYX.shape), 1).to(x_NCYX.dtype)
        if ctx.needs_input_grad[1]:
            along_y, along_x = coordinate_gradient(torch.cat(weight_grads), taps)
            dy = limit_at_border(along_y.view_as(sy_N1HW), sy_N1HW, num_rows, border_gradient)
            dx = limit_at_border(along_x.view_as(sx_N1HW), sx_N1HW, num_columns, border_gradient)
            grad_offset = torch.cat([dy, dx], dim=1).to(offset_N2HW.dtype)
        return grad_x, grad_offset, None, None, None, None, None


def sampled_cross_entropy(
    x_NCYX: Tensor,
    offset_N2HW: Tensor,
    label_NHW: Tensor,
    *,
    scale: tuple[int, int],
    base_grid: BaseGrid = "asymmetric",
    border_gradient: BorderGradient = "inclusive",
    ignore_index: int = 255,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """`pixel_loss(location_aware_upsample(x, offset), label)` without a tensor of the output's size.

    Args:
        x_NCYX: Low-resolution logits; one channel is the logit of a sigmoid.
        offset_N2HW: One offset field per image, in cells.
        label_NHW: Labels at the resolution of the offsets.
        scale: Up-sampling factors (k_h, k_w).
        base_grid: Where a zero offset samples.
        border_gradient: As in `location_aware_upsample`.
        ignore_index: Label of pixels that do not count.
        backend: ``rows``, ``triton`` (CUDA kernels; a label that is no class gives NaN), or ``auto``: rows.

    Returns:
        Loss of every pixel (N, H, W), fp32 (fp64 for fp64 logits), 0 at ignored pixels, with gradients to the
        logits and the offsets; and whether no class beats the label (bool, no gradient).

    Raises:
        ValueError: If the shapes or the backend do not fit.
        ImportError: If ``triton`` is asked for and not installed.
    """
    if backend not in FUSED_BACKENDS:
        raise ValueError(
            f"backend of the sampled loss must be one of {', '.join(FUSED_BACKENDS)}; got {backend!r}. "
            "F.grid_sample holds the enlarged logits, which this loss is there to avoid."
        )
    needed = (x_NCYX.shape[0], 2, x_NCYX.shape[2] * scale[0], x_NCYX.shape[3] * scale[1])
    if tuple(offset_N2HW.shape) != needed or tuple(label_NHW.shape) != (needed[0], *needed[2:]):
        raise ValueError(
            f"the sampled loss needs offsets {needed} and labels {(needed[0], *needed[2:])} for logits "
            f"{tuple(x_NCYX.shape)} at scale {scale}; got {tuple(offset_N2HW.shape)} and "
            f"{tuple(label_NHW.shape)}. Reduce the labels to the enlarged map first."
        )
    function = load_kernels(x_NCYX).CrossEntropyKernels if backend == "triton" else _SampledCrossEntropy
    return function.apply(
        two_sided(x_NCYX), offset_N2HW, label_NHW, scale, base_grid, border_gradient, ignore_index
    )
