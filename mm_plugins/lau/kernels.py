"""The operator and its fused loss as Triton kernels for CUDA; imported only for ``backend="triton"``.

No kernel adds atomically. Forward works pixel by pixel; backward sorts the pixels by the upper left cell they
sample, and one program sums the pixels of one cell in that order, so two runs give the same bits whatever the
offsets are. The classes or features of a pixel are read where the map has them: no copy of the map, of the
offsets or of the gradient is made.
"""

# Arguments of kernels are pointers, sizes and strides, which Triton types by itself.
# ruff: noqa: ANN001, ANN202
# Shapes: N images, C channels, Y x X low-resolution cells, H x W output pixels, G groups of channels that
# share an offset, O = 2*G offset channels, B = N*G maps, T = C/G channels of one map, K = B*Y*X cells,
# P = B*H*W pixels, S slices of the channels. Inside a kernel: t channels and s pixels of one block.
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mm_plugins.lau.sampling import BaseGrid, BorderGradient, base_coordinates, rows_to_map

# Pixels of a block where pixels are neighbours, and channels of a block. Chosen by arithmetic, not measured:
# a tile of 128 x 16 values keeps 16 fp32 registers a thread for each of the four corners.
PIXELS, CHANNELS = 128, 16


@triton.jit
def _split(s, num_cells):
    """First of the two cells along one axis, and the share of the second; NaN stays NaN in the share."""
    known = s == s
    last = tl.zeros_like(s) + (num_cells - 1)
    clamped = tl.minimum(tl.maximum(tl.where(known, s, 0.0), 0.0), last)
    # The last cell is the second of its pair, so that the slope there is the left one and never 0 - value.
    first = tl.minimum(tl.floor(clamped), tl.maximum(last - 1, 0.0))
    return first.to(tl.int32), tl.where(known, clamped - first, s)


@triton.jit
def _coordinates(
    offset, base_y, base_x, image, group, num_groups, pixel_s, inside_s, width, o_n, o_c, o_h, o_w
):
    """Where pixels of one map sample, before the clamp; at least fp32, as the base coordinates are."""
    row_s, column_s = pixel_s // width, pixel_s % width
    start_y = tl.load(base_y + row_s, mask=inside_s, other=0.0)
    start_x = tl.load(base_x + column_s, mask=inside_s, other=0.0)
    place = offset + image * o_n + group * o_c + row_s.to(tl.int64) * o_h + column_s.to(tl.int64) * o_w
    dy_s = tl.load(place, mask=inside_s, other=0.0).to(start_y.dtype)
    dx_s = tl.load(place + num_groups * o_c, mask=inside_s, other=0.0).to(start_x.dtype)
    return start_y + dy_s, start_x + dx_s


@triton.jit
def _mix(ul, ur, ll, lr, down, right):
    """Bilinear mixture of the four corners."""
    return (1 - down) * ((1 - right) * ul + right * ur) + down * ((1 - right) * ll + right * lr)


@triton.jit
def _sample_kernel(
    x, offset, base_y, base_x, out, num_groups, num_channels, num_pixels, width, num_rows, num_columns,
    x_n, x_c, x_y, x_x, row_step, column_step, o_n, o_c, o_h, o_w,
    ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Forward: one block of pixels of one map, all channels."""
    pixel_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    map_index = tl.program_id(1).to(tl.int64)
    image, group = map_index // num_groups, map_index % num_groups
    inside_s = pixel_s < num_pixels
    sy_s, sx_s = _coordinates(
        offset, base_y, base_x, image, group, num_groups, pixel_s, inside_s, width, o_n, o_c, o_h, o_w
    )
    y_s, down_s = _split(sy_s, num_rows)
    x_s, right_s = _split(sx_s, num_columns)
    down_s, right_s = down_s.to(ACC)[None, :], right_s.to(ACC)[None, :]
    cell_s = x + image * x_n + y_s.to(tl.int64) * x_y + x_s.to(tl.int64) * x_x
    for start in range(0, num_channels, BLOCK_T):
        channel_t = start + tl.arange(0, BLOCK_T)
        mask = (channel_t < num_channels)[:, None] & inside_s[None, :]
        place = cell_s[None, :] + ((group * num_channels + channel_t) * x_c)[:, None]
        ul = tl.load(place, mask=mask, other=0.0).to(ACC)
        ur = tl.load(place + column_step, mask=mask, other=0.0).to(ACC)
        ll = tl.load(place + row_step, mask=mask, other=0.0).to(ACC)
        lr = tl.load(place + row_step + column_step, mask=mask, other=0.0).to(ACC)
        value = _mix(ul, ur, ll, lr, down_s, right_s)
        there = (map_index * num_channels + channel_t)[:, None] * num_pixels + pixel_s[None, :]
        tl.store(out + there, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _cross_entropy_kernel(
    x, offset, base_y, base_x, label, loss, log_sum, right, num_channels, num_pixels, width, num_rows,
    num_columns, x_n, x_c, x_y, x_x, row_step, column_step, o_n, o_c, o_h, o_w, ignore_index,
    ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Forward of the fused loss: an online log-sum-exp over the sampled logits, which are never stored."""
    pixel_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    image = tl.program_id(1).to(tl.int64)
    inside_s = pixel_s < num_pixels
    sy_s, sx_s = _coordinates(
        offset, base_y, base_x, image, 0, 1, pixel_s, inside_s, width, o_n, o_c, o_h, o_w
    )
    y_s, down_s = _split(sy_s, num_rows)
    x_s, right_s = _split(sx_s, num_columns)
    down_s, right_s = down_s.to(ACC)[None, :], right_s.to(ACC)[None, :]
    cell_s = x + image * x_n + y_s.to(tl.int64) * x_y + x_s.to(tl.int64) * x_x
    there_s = image * num_pixels + pixel_s
    label_s = tl.load(label + there_s, mask=inside_s, other=0)
    highest_s = tl.full([BLOCK_S], float("-inf"), ACC)
    total_s, score_s = tl.zeros([BLOCK_S], ACC), tl.zeros([BLOCK_S], ACC)
    for start in range(0, num_channels, BLOCK_T):
        channel_t = start + tl.arange(0, BLOCK_T)
        real_t = channel_t < num_channels
        mask = real_t[:, None] & inside_s[None, :]
        place = cell_s[None, :] + (channel_t.to(tl.int64) * x_c)[:, None]
        ul = tl.load(place, mask=mask, other=0.0).to(ACC)
        ur = tl.load(place + column_step, mask=mask, other=0.0).to(ACC)
        ll = tl.load(place + row_step, mask=mask, other=0.0).to(ACC)
        lr = tl.load(place + row_step + column_step, mask=mask, other=0.0).to(ACC)
        value = _mix(ul, ur, ll, lr, down_s, right_s)
        score_s += tl.sum(tl.where(channel_t[:, None] == label_s[None, :], value, 0.0), 0)
        value = tl.where(real_t[:, None], value, float("-inf"))
        peak_s = tl.maximum(tl.max(value, 0), highest_s)
        total_s = total_s * tl.exp(highest_s - peak_s) + tl.sum(tl.exp(value - peak_s[None, :]), 0)
        highest_s = peak_s
    log_sum_s = highest_s + tl.log(total_s)
    # A label that is no class gives NaN: on a GPU there is no cheap way to raise.
    known_s = (label_s >= 0) & (label_s < num_channels)
    loss_s = tl.where(known_s, log_sum_s - score_s, float("nan"))
    tl.store(loss + there_s, tl.where(label_s == ignore_index, 0.0, loss_s), mask=inside_s)
    tl.store(log_sum + there_s, log_sum_s, mask=inside_s)
    counted_s = known_s & (label_s != ignore_index)
    tl.store(right + there_s, counted_s & (score_s >= highest_s), mask=inside_s)


@triton.jit
def _cell_kernel(
    offset, base_y, base_x, cell, num_groups, num_pixels, width, num_rows, num_columns,
    o_n, o_c, o_h, o_w, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Upper left cell of every pixel, counted over all maps: the key that backward sorts by."""
    pixel_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    map_index = tl.program_id(1).to(tl.int64)
    inside_s = pixel_s < num_pixels
    sy_s, sx_s = _coordinates(
        offset, base_y, base_x, map_index // num_groups, map_index % num_groups, num_groups, pixel_s,
        inside_s, width, o_n, o_c, o_h, o_w,
    )  # fmt: skip
    y_s, _ = _split(sy_s, num_rows)
    x_s, _ = _split(sx_s, num_columns)
    first = map_index * num_rows * num_columns
    tl.store(cell + map_index * num_pixels + pixel_s, first + y_s * num_columns + x_s, mask=inside_s)


@triton.jit
def _gather_kernel(
    x, offset, base_y, base_x, grad, label, log_sum, order, start, out_ul, out_ur, out_ll, out_lr, slope,
    num_groups, num_channels, num_pixels, total_pixels, width, num_rows, num_columns,
    x_n, x_c, x_y, x_x, o_n, o_c, o_h, o_w, g_n, g_c, g_h, g_w, ignore_index,
    ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Backward: one program reads the pixels of one upper left cell in sorted order, a slice of channels.

    Writes the sums for the four corners of that cell, and this slice's part of the slopes of its pixels.
    With labels the gradient of a sampled logit is recomputed from the loss: (softmax - one-hot) * grad.
    """
    cell = tl.program_id(0).to(tl.int64)
    map_index, inner = cell // (num_rows * num_columns), cell % (num_rows * num_columns)
    image, group = map_index // num_groups, map_index % num_groups
    channel_t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    real_t = channel_t < num_channels
    place_t = x + image * x_n + (group * num_channels + channel_t) * x_c
    row, column = inner // num_columns, inner % num_columns
    # No segment starts in the last of several rows or columns; of a single one the second cell is the first.
    row_step = (tl.minimum(row + 1, num_rows - 1) - row) * x_y
    column_step = (tl.minimum(column + 1, num_columns - 1) - column) * x_x
    place_t += row * x_y + column * x_x
    ul = tl.load(place_t, mask=real_t, other=0.0).to(ACC)
    ur = tl.load(place_t + column_step, mask=real_t, other=0.0).to(ACC)
    ll = tl.load(place_t + row_step, mask=real_t, other=0.0).to(ACC)
    lr = tl.load(place_t + row_step + column_step, mask=real_t, other=0.0).to(ACC)
    ul, ur, ll, lr = ul[:, None], ur[:, None], ll[:, None], lr[:, None]
    sum_ul, sum_ur = tl.zeros([BLOCK_T], ACC), tl.zeros([BLOCK_T], ACC)
    sum_ll, sum_lr = tl.zeros([BLOCK_T], ACC), tl.zeros([BLOCK_T], ACC)
    first, last = tl.load(start + cell), tl.load(start + cell + 1)
    for position in range(first, last, BLOCK_S):
        position_s = position + tl.arange(0, BLOCK_S)
        inside_s = position_s < last
        flat_s = tl.load(order + position_s, mask=inside_s, other=0)
        pixel_s = tl.where(inside_s, flat_s - map_index * num_pixels, 0)
        sy_s, sx_s = _coordinates(
            offset, base_y, base_x, image, group, num_groups, pixel_s, inside_s, width, o_n, o_c, o_h, o_w
        )
        _, down_s = _split(sy_s, num_rows)
        _, right_s = _split(sx_s, num_columns)
        down, right = down_s.to(ACC)[None, :], right_s.to(ACC)[None, :]
        grad_s = grad + image * g_n + (pixel_s // width) * g_h + (pixel_s % width) * g_w
        mask = real_t[:, None] & inside_s[None, :]
        if label is None:
            there = grad_s[None, :] + ((group * num_channels + channel_t) * g_c)[:, None]
            g = tl.load(there, mask=mask, other=0.0).to(ACC)
        else:
            label_s = tl.load(label + flat_s, mask=inside_s, other=0)
            counted_s = inside_s & (label_s != ignore_index)
            factor_s = tl.load(grad_s, mask=counted_s, other=0.0).to(ACC)
            log_sum_s = tl.load(log_sum + flat_s, mask=inside_s, other=0.0)
            share = tl.exp(_mix(ul, ur, ll, lr, down, right) - log_sum_s[None, :])
            g = (share - (channel_t[:, None] == label_s[None, :]).to(ACC)) * factor_s[None, :]
            g = tl.where(mask & counted_s[None, :], g, 0.0)
        sum_ul += tl.sum(g * ((1 - down) * (1 - right)), 1)
        sum_ur += tl.sum(g * ((1 - down) * right), 1)
        sum_ll += tl.sum(g * (down * (1 - right)), 1)
        sum_lr += tl.sum(g * (down * right), 1)
        along_y = tl.sum(g * ((1 - right) * (ll - ul) + right * (lr - ur)), 0)
        along_x = tl.sum(g * ((1 - down) * (ur - ul) + down * (lr - ll)), 0)
        here = slope + tl.program_id(1).to(tl.int64) * 2 * total_pixels + flat_s
        tl.store(here, along_y, mask=inside_s)
        tl.store(here + total_pixels, along_x, mask=inside_s)
    there_t = cell * num_channels + channel_t
    tl.store(out_ul + there_t, sum_ul, mask=real_t)
    tl.store(out_ur + there_t, sum_ur, mask=real_t)
    tl.store(out_ll + there_t, sum_ll, mask=real_t)
    tl.store(out_lr + there_t, sum_lr, mask=real_t)


@triton.jit
def _combine_kernel(
    ul, ur, ll, lr, out, num_channels, num_rows, num_columns, BLOCK_T: tl.constexpr
):  # fmt: skip
    """Gradient of one cell: what it got as the upper left, upper right, lower left and lower right corner."""
    cell = tl.program_id(0).to(tl.int64)
    column, row = cell % num_columns, cell // num_columns % num_rows
    channel_t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    # Channels to read from each neighbour: none where there is no neighbour.
    beside, over = tl.where(column > 0, num_channels, 0), tl.where(row > 0, num_channels, 0)
    own, above = cell * num_channels + channel_t, (cell - num_columns) * num_channels + channel_t
    value = tl.load(ul + own, mask=channel_t < num_channels, other=0.0)
    value += tl.load(ur + own - num_channels, mask=channel_t < beside, other=0.0)
    value += tl.load(ll + above, mask=channel_t < over, other=0.0)
    value += tl.load(lr + above - num_channels, mask=channel_t < tl.minimum(beside, over), other=0.0)
    tl.store(out + own, value.to(out.dtype.element_ty), mask=channel_t < num_channels)


@triton.jit
def _at_border(grad, s, num_cells, INWARD: tl.constexpr):
    """The rule of `limit_at_border`."""
    last = tl.zeros_like(s) + (num_cells - 1)
    kept = ((s >= 0) & (s <= last)) | (s != s)
    if INWARD:
        kept = kept | ((s < 0) & (grad < 0)) | ((s > last) & (grad > 0))
    return tl.where(kept, grad, 0.0)


@triton.jit
def _slope_kernel(
    offset, base_y, base_x, slope, out, num_groups, num_pixels, width, num_rows, num_columns, total_pixels,
    num_slices, o_n, o_c, o_h, o_w,
    INWARD: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Gradient of the offsets: the slices of channels added in order, then the rule for the border."""
    pixel_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    map_index = tl.program_id(1).to(tl.int64)
    image, group = map_index // num_groups, map_index % num_groups
    inside_s = pixel_s < num_pixels
    sy_s, sx_s = _coordinates(
        offset, base_y, base_x, image, group, num_groups, pixel_s, inside_s, width, o_n, o_c, o_h, o_w
    )
    here = slope + map_index * num_pixels + pixel_s
    dy_s = tl.load(here, mask=inside_s, other=0.0)
    dx_s = tl.load(here + total_pixels, mask=inside_s, other=0.0)
    for _ in range(1, num_slices):
        here += 2 * total_pixels
        dy_s += tl.load(here, mask=inside_s, other=0.0)
        dx_s += tl.load(here + total_pixels, mask=inside_s, other=0.0)
    there = out + (image * 2 * num_groups + group) * num_pixels + pixel_s
    dtype = out.dtype.element_ty
    tl.store(there, _at_border(dy_s, sy_s, num_rows, INWARD).to(dtype), mask=inside_s)
    tl.store(
        there + num_groups * num_pixels, _at_border(dx_s, sx_s, num_columns, INWARD).to(dtype), mask=inside_s
    )


# Under TRITON_INTERPRET=1 the decorator gives another class, which runs on the CPU.
INTERPRETED = not isinstance(_sample_kernel, triton.JITFunction)


class _Problem:
    """What all kernels need to know of a map and its offsets."""

    def __init__(
        self, x_NCYX: Tensor, offset_NOHW: Tensor, scale: tuple[int, int], base_grid: BaseGrid
    ) -> None:
        self.x, self.offset = x_NCYX, offset_NOHW
        num_images, num_channels, self.num_rows, self.num_columns = x_NCYX.shape
        self.shape = (num_images, num_channels, self.num_rows, self.num_columns)
        self.height, self.width = offset_NOHW.shape[2:]
        self.num_groups = offset_NOHW.shape[1] // 2
        self.num_maps, self.num_channels = num_images * self.num_groups, num_channels // self.num_groups
        self.num_pixels, self.num_cells = self.height * self.width, self.num_rows * self.num_columns
        self.base = (
            base_coordinates(self.height, self.num_rows, scale[0], base_grid, offset_NOHW),
            base_coordinates(self.width, self.num_columns, scale[1], base_grid, offset_NOHW),
        )
        self.dtype = torch.float64 if x_NCYX.dtype == torch.float64 else torch.float32
        self.ACC = tl.float64 if x_NCYX.dtype == torch.float64 else tl.float32
        below, beside = x_NCYX.stride(2), x_NCYX.stride(3)
        # With one row or column the second cell is the first one, with weight 0.
        self.steps = (below if self.num_rows > 1 else 0, beside if self.num_columns > 1 else 0)

    def pixel_grid(self) -> tuple[int, int]:
        """One program for each block of pixels of each map."""
        return triton.cdiv(self.num_pixels, PIXELS), self.num_maps

    def sample(self) -> Tensor:
        """The enlarged map (N, C, H, W)."""
        out = self.x.new_empty(self.x.shape[0], self.x.shape[1], self.height, self.width)
        _sample_kernel[self.pixel_grid()](
            self.x, self.offset, *self.base, out, self.num_groups, self.num_channels, self.num_pixels,
            self.width, self.num_rows, self.num_columns, *self.x.stride(), *self.steps,
            *self.offset.stride(), ACC=self.ACC, BLOCK_T=CHANNELS, BLOCK_S=PIXELS,
        )  # fmt: skip
        return out

    def cross_entropy(self, label_NHW: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, log-sum-exp and whether no class beats the label, each (N, H, W)."""
        loss = torch.empty(label_NHW.shape, dtype=self.dtype, device=self.x.device)
        log_sum, right = torch.empty_like(loss), torch.empty_like(loss, dtype=torch.bool)
        _cross_entropy_kernel[self.pixel_grid()](
            self.x, self.offset, *self.base, label_NHW, loss, log_sum, right, self.num_channels,
            self.num_pixels, self.width, self.num_rows, self.num_columns, *self.x.stride(), *self.steps,
            *self.offset.stride(), ignore_index, ACC=self.ACC, BLOCK_T=CHANNELS, BLOCK_S=PIXELS,
        )  # fmt: skip
        return loss, log_sum, right

    def segments(self) -> tuple[Tensor, Tensor]:
        """Pixels sorted by their upper left cell (P,), and where each cell's begin (K + 1,)."""
        cell = torch.empty(self.num_maps * self.num_pixels, dtype=torch.int32, device=self.x.device)
        _cell_kernel[self.pixel_grid()](
            self.offset, *self.base, cell, self.num_groups, self.num_pixels, self.width, self.num_rows,
            self.num_columns, *self.offset.stride(), BLOCK_S=PIXELS,
        )  # fmt: skip
        ordered, order = torch.sort(cell, stable=True)
        total = self.num_maps * self.num_cells
        # searchsorted, not bincount: bincount adds atomically on a GPU.
        bounds = torch.arange(total + 1, dtype=torch.int32, device=cell.device)
        return order, torch.searchsorted(ordered, bounds)

    def gradients(
        self,
        grad: Tensor,
        strides: tuple[int, ...],
        border_gradient: BorderGradient,
        *,
        label: Tensor | None = None,
        log_sum: Tensor | None = None,
        ignore_index: int = 255,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the map and the offsets from that of the output, or of the fused loss.

        Args:
            grad: Gradient of the output (N, C, H, W), or of the loss (N, H, W) if labels are given.
            strides: Its strides along N, C, H, W.
            border_gradient: As in `location_aware_upsample`.
            label: Labels (N, H, W) of the fused loss.
            log_sum: Log-sum-exp (N, H, W) of the fused loss.
            ignore_index: Label of pixels that do not count.
        """
        order, start = self.segments()
        total_cells, total_pixels = self.num_maps * self.num_cells, self.num_maps * self.num_pixels
        block_t = min(triton.next_power_of_2(self.num_channels), 64)
        slices = triton.cdiv(self.num_channels, block_t)
        # About as many pixels as sample one cell when the offsets are small.
        block_s = min(max(triton.next_power_of_2(self.num_pixels // self.num_cells), 16), 64)
        sums = torch.empty(4, total_cells, self.num_channels, dtype=self.dtype, device=self.x.device).unbind()
        slope = torch.empty(slices, 2, total_pixels, dtype=self.dtype, device=self.x.device)
        _gather_kernel[total_cells, slices](
            self.x, self.offset, *self.base, grad, label, log_sum, order, start, *sums, slope,
            self.num_groups, self.num_channels, self.num_pixels, total_pixels, self.width, self.num_rows,
            self.num_columns, *self.x.stride(), *self.offset.stride(), *strides, ignore_index,
            ACC=self.ACC, BLOCK_T=block_t, BLOCK_S=block_s,
        )  # fmt: skip
        rows = torch.empty(total_cells, self.num_channels, dtype=self.x.dtype, device=self.x.device)
        _combine_kernel[total_cells, slices](
            *sums, rows, self.num_channels, self.num_rows, self.num_columns, BLOCK_T=block_t
        )
        grad_offset = torch.empty(self.offset.shape, dtype=self.offset.dtype, device=self.x.device)
        _slope_kernel[self.pixel_grid()](
            self.offset, *self.base, slope, grad_offset, self.num_groups, self.num_pixels, self.width,
            self.num_rows, self.num_columns, total_pixels, slices, *self.offset.stride(),
            INWARD=border_gradient == "inward", BLOCK_S=PIXELS,
        )  # fmt: skip
        return rows_to_map(rows, self.shape, self.num_groups), grad_offset


class SampleKernels(torch.autograd.Function):
    """`location_aware_upsample` by the kernels. Keeps the two inputs for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NCYX: Tensor,
        offset_NOHW: Tensor,
        scale: tuple[int, int],
        base_grid: BaseGrid,
        border_gradient: BorderGradient,
    ) -> Tensor:
        """The enlarged map."""
        ctx.save_for_backward(x_NCYX, offset_NOHW)
        ctx.options = (scale, base_grid, border_gradient)
        with torch.cuda.device_of(x_NCYX):
            return _Problem(x_NCYX, offset_NOHW, scale, base_grid).sample()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NCHW: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of map and offsets."""
        x_NCYX, offset_NOHW = ctx.saved_tensors
        scale, base_grid, border_gradient = ctx.options
        with torch.cuda.device_of(x_NCYX):
            problem = _Problem(x_NCYX, offset_NOHW, scale, base_grid)
            grads = problem.gradients(grad_NCHW, grad_NCHW.stride(), border_gradient)
        return *grads, None, None, None


class CrossEntropyKernels(torch.autograd.Function):
    """`sampled_cross_entropy` by the kernels. Keeps the inputs and one number a pixel for backward."""

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
        """Loss of every pixel, and whether no class beats its label."""
        label_NHW = label_NHW.contiguous()
        with torch.cuda.device_of(x_NCYX):
            problem = _Problem(x_NCYX, offset_N2HW, scale, base_grid)
            loss_NHW, log_sum_NHW, right_NHW = problem.cross_entropy(label_NHW, ignore_index)
        ctx.save_for_backward(x_NCYX, offset_N2HW, label_NHW, log_sum_NHW)
        ctx.options = (scale, base_grid, border_gradient, ignore_index)
        ctx.mark_non_differentiable(right_NHW)
        return loss_NHW, right_NHW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NHW: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of logits and offsets."""
        x_NCYX, offset_N2HW, label_NHW, log_sum_NHW = ctx.saved_tensors
        scale, base_grid, border_gradient, ignore_index = ctx.options
        strides = (grad_NHW.stride(0), 0, grad_NHW.stride(1), grad_NHW.stride(2))
        with torch.cuda.device_of(x_NCYX):
            grads = _Problem(x_NCYX, offset_N2HW, scale, base_grid).gradients(
                grad_NHW, strides, border_gradient,
                label=label_NHW, log_sum=log_sum_NHW, ignore_index=ignore_index,
            )  # fmt: skip
        return *grads, None, None, None, None, None
