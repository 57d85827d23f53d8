"""The operator of LaU: every high-resolution pixel chooses where in the low-resolution map it samples."""

# Shapes: N images, C channels, Y x X low-resolution cells, H x W output pixels, G groups of channels that
# share an offset, O = 2*G offset channels (G vertical, then G horizontal), B = N*G maps, T = C/G channels of
# one map, K = Y*X cells, P samples (all pixels of all maps, or a part of those of one map).
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BaseGrid = Literal["asymmetric", "half_pixel", "align_corners"]
BorderGradient = Literal["inclusive", "inward"]
Backend = Literal["auto", "rows", "grid_sample", "triton"]
BASE_GRIDS = ("asymmetric", "half_pixel", "align_corners")
BORDER_GRADIENTS = ("inclusive", "inward")
BACKENDS = ("auto", "rows", "grid_sample", "triton")


class Taps(NamedTuple):
    """The four cells that each sample mixes, and how.

    Attributes:
        cell_P: Index of the upper left cell into the flattened (B, Y, X) cells, int32.
        down_P: Share of the lower row, in [0, 1]; NaN where the coordinate is NaN.
        right_P: Share of the right column, in [0, 1]; NaN where the coordinate is NaN.
        row_step: Distance to the cell below in the flattened cells; 0 if there is one row.
        column_step: Distance to the cell at the right; 0 if there is one column.
    """

    cell_P: Tensor
    down_P: Tensor
    right_P: Tensor
    row_step: int
    column_step: int

    def piece(self, index: int, start: int, length: int, num_pixels: int, num_cells: int) -> "Taps":
        """Part of the samples of one map, with cells counted from that map's first."""
        first = index * num_pixels
        part = slice(first + start, first + min(start + length, num_pixels))
        cell_P = self.cell_P[part] - index * num_cells
        return Taps(cell_P, self.down_P[part], self.right_P[part], self.row_step, self.column_step)

    def cells(self) -> Tensor:
        """Indices of the four cells (P, 4): upper left, upper right, lower left, lower right."""
        below = self.row_step
        steps = (0, self.column_step, below, below + self.column_step)
        return torch.stack([self.cell_P + step for step in steps], dim=1)

    def weights(self) -> Tensor:
        """Their weights (P, 4); each row sums to 1."""
        up_P, left_P = 1 - self.down_P, 1 - self.right_P
        return torch.stack(
            [up_P * left_P, up_P * self.right_P, self.down_P * left_P, self.down_P * self.right_P], dim=1
        )


def scale_pair(scale_factor: int | tuple[int, int]) -> tuple[int, int]:
    """The two whole up-sampling factors (vertical, horizontal).

    Raises:
        ValueError: If a factor is not a whole number >= 1.
    """
    pair = scale_factor if isinstance(scale_factor, tuple | list) else (scale_factor, scale_factor)
    if len(pair) != 2 or any(isinstance(k, bool) or int(k) != k or k < 1 for k in pair):
        raise ValueError(
            f"scale_factor must be a whole number >= 1 or a pair of them; got {scale_factor!r}. "
            "Resize the rest with F.interpolate, or give size= for a cropped output."
        )
    return int(pair[0]), int(pair[1])


def base_coordinates(num_out: int, num_cells: int, factor: int, base_grid: BaseGrid, like: Tensor) -> Tensor:
    """Where the pixels of one axis sample when their offset is 0, in cells.

    Args:
        num_out: Pixels of that axis; `factor * num_cells` or less.
        num_cells: Cells of that axis.
        factor: Up-sampling factor k.
        base_grid: ``asymmetric``: p/k; ``half_pixel``: (p + 1/2)/k - 1/2;
            ``align_corners``: p*(n-1)/(k*n-1).
        like: Gives device and dtype; at least fp32 is used.

    Returns:
        Coordinates (num_out,), not clamped: half-pixel ones start below 0.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    pixel = torch.arange(num_out, device=like.device, dtype=dtype)
    if base_grid == "half_pixel":
        return (pixel + 0.5) / factor - 0.5
    if base_grid == "align_corners":
        return pixel * ((num_cells - 1) / max(factor * num_cells - 1, 1))
    return pixel / factor


def sampling_coordinates(
    offset_NOHW: Tensor, num_rows: int, num_columns: int, scale: tuple[int, int], base_grid: BaseGrid
) -> tuple[Tensor, Tensor]:
    """Base coordinates plus offsets, before the clamp to the map.

    Returns:
        Vertical and horizontal coordinates (N, G, H, W) in cells, at least fp32.
    """
    height, width = offset_NOHW.shape[2:]
    base_H = base_coordinates(height, num_rows, scale[0], base_grid, offset_NOHW)
    base_W = base_coordinates(width, num_columns, scale[1], base_grid, offset_NOHW)
    # Coordinates in half precision are off by up to a quarter of a cell.
    dy_NGHW, dx_NGHW = offset_NOHW.to(base_H.dtype).chunk(2, dim=1)
    return dy_NGHW + base_H[:, None], dx_NGHW + base_W


def _split(s_NGHW: Tensor, num_cells: int) -> tuple[Tensor, Tensor]:
    """First of the two cells and the share of the second, along one axis."""
    clamped = s_NGHW.clamp(0, num_cells - 1)
    # The last cell is the second of its pair, so that the slope there is the left one and never 0 - value.
    first = clamped.floor().clamp(max=max(num_cells - 2, 0)).nan_to_num(0.0)
    return first, clamped - first


def find_taps(sy_NGHW: Tensor, sx_NGHW: Tensor, num_rows: int, num_columns: int) -> Taps:
    """Cells and weights of all samples; coordinates are clamped to the map, NaN stays NaN in the weights."""
    y0, down = _split(sy_NGHW, num_rows)
    x0, right = _split(sx_NGHW, num_columns)
    num_maps = sy_NGHW.shape[0] * sy_NGHW.shape[1]
    map_index = torch.arange(num_maps, device=y0.device, dtype=torch.int32).view(*sy_NGHW.shape[:2], 1, 1)
    cell = map_index * (num_rows * num_columns) + (y0.int() * num_columns + x0.int())
    row_step, column_step = (num_columns if num_rows > 1 else 0), (1 if num_columns > 1 else 0)
    return Taps(cell.flatten(), down.flatten(), right.flatten(), row_step, column_step)


def cell_rows(x_NCYX: Tensor, num_groups: int) -> Tensor:
    """The map as a table with one row for each cell: (B*Y*X, T), at least fp32."""
    num_images, num_channels, num_rows, num_columns = x_NCYX.shape
    grouped = x_NCYX.reshape(
        num_images, num_groups, num_channels // num_groups, num_rows * num_columns
    ).transpose(2, 3)
    dtype = torch.float64 if x_NCYX.dtype == torch.float64 else torch.float32
    # For one image the transposed map is a mere view, on which embedding_bag is many times slower.
    return grouped.to(dtype).contiguous().view(-1, num_channels // num_groups)


def rows_to_map(rows: Tensor, shape: tuple[int, int, int, int], num_groups: int) -> Tensor:
    """The inverse of `cell_rows`: rows (B*Y*X, T) as a map of `shape`; a view if there is one group."""
    num_images, num_channels, num_rows, num_columns = shape
    grouped = rows.view(num_images, num_groups, num_rows, num_columns, num_channels // num_groups)
    return grouped.permute(0, 1, 4, 2, 3).reshape(shape)


def mix_rows(table: Tensor, taps: Taps) -> Tensor:
    """Weighted sum of four rows of `table` (cells, T) for every sample: (P, T)."""
    return F.embedding_bag(taps.cells(), table, per_sample_weights=taps.weights().to(table.dtype), mode="sum")


def weight_gradient(table: Tensor, taps: Taps, grad_PT: Tensor) -> Tensor:
    """Gradient of `mix_rows` to the four weights of each sample: (P, 4)."""
    cells_P4 = taps.cells()
    bag_P = torch.arange(len(cells_P4), device=cells_P4.device, dtype=cells_P4.dtype)
    # What autograd calls, alone: autograd would mix all rows again first, and take twice as long.
    found = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad_PT, table.detach(), cells_P4.flatten(), 4 * bag_P, bag_P.repeat_interleave(4), 0
    )
    return found.view(-1, 4)


def coordinate_gradient(weight_grad_P4: Tensor, taps: Taps) -> tuple[Tensor, Tensor]:
    """Chain rule from the four weights to the two coordinates, without regard to the border: (P,), (P,)."""
    ul, ur, ll, lr = weight_grad_P4.unbind(1)
    along_y = (1 - taps.right_P) * (ll - ul) + taps.right_P * (lr - ur)
    along_x = (1 - taps.down_P) * (ur - ul) + taps.down_P * (lr - ll)
    return along_y, along_x


def limit_at_border(grad: Tensor, s: Tensor, num_cells: int, border_gradient: BorderGradient) -> Tensor:
    """Gradient to a coordinate after the clamp to [0, num_cells - 1].

    ``inclusive`` keeps it on the closed interval and gives 0 outside. ``inward`` also keeps it outside where
    a descent step leads back to the map, so that an offset which left the map is not lost.
    """
    inside = (s >= 0) & (s <= num_cells - 1)
    if border_gradient == "inward":
        inside = inside | ((s < 0) & (grad < 0)) | ((s > num_cells - 1) & (grad > 0))
    # where, not a product: 0 * NaN would be NaN. A coordinate that is NaN keeps its NaN gradient.
    return torch.where(inside | s.isnan(), grad, torch.zeros_like(grad))


def add_scattered(total_YXT: Tensor, grad_PT: Tensor, taps: Taps) -> None:
    """Add the transpose of `mix_rows` to one map: each cell gets the weighted gradients of its samples.

    Samples are sorted by their upper left cell, and each of the four corners is one segmented sum over that
    order. No atomic addition takes part, so two runs give the same bits on every device.

    Args:
        total_YXT: Sum so far; changed in place.
        grad_PT: Gradients of the samples.
        taps: Cells and weights of the same samples, all of this map.
    """
    num_rows, num_columns, _ = total_YXT.shape
    cell_P, order_P = torch.sort(taps.cell_P, stable=True)
    cells = torch.arange(num_rows * num_columns, device=order_P.device, dtype=cell_P.dtype)
    # searchsorted, not bincount: bincount adds atomically on a GPU.
    start = torch.searchsorted(cell_P, cells)
    weights_4P = taps.weights().to(grad_PT.dtype).index_select(0, order_P).t().contiguous()
    for weight_P, (down, right) in zip(weights_4P, ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True):
        part = F.embedding_bag(order_P, grad_PT, start, per_sample_weights=weight_P, mode="sum")
        part = part.view_as(total_YXT)
        # With one row or column the second cell has weight 0, and these slices are empty.
        total_YXT[down:, right:] += part[: num_rows - down, : num_columns - right]


def chunk_length(num_channels: int, num_cells: int) -> int:
    """Samples handled at a time: about 4 MB of values, but enough that sums over cells do not dominate."""
    return max(2**20 // num_channels, 4 * num_cells)


class _SampleRows(torch.autograd.Function):
    """Four weighted rows for each sample. Keeps the two inputs for backward, and nothing of output size."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NCYX: Tensor,
        offset_NOHW: Tensor,
        scale: tuple[int, int],
        base_grid: BaseGrid,
        border_gradient: BorderGradient,
    ) -> Tensor:
        ctx.save_for_backward(x_NCYX, offset_NOHW)
        ctx.options = (scale, base_grid, border_gradient)
        num_images, num_channels, num_rows, num_columns = x_NCYX.shape
        num_groups = offset_NOHW.shape[1] // 2
        s_NGHW = sampling_coordinates(offset_NOHW, num_rows, num_columns, scale, base_grid)
        mixed_PT = mix_rows(cell_rows(x_NCYX, num_groups), find_taps(*s_NGHW, num_rows, num_columns))
        shape = (num_images, num_channels, *offset_NOHW.shape[2:])
        return rows_to_map(mixed_PT.to(x_NCYX.dtype), shape, num_groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NCHW: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x_NCYX, offset_NOHW = ctx.saved_tensors
        scale, base_grid, border_gradient = ctx.options
        num_images, _, num_rows, num_columns = x_NCYX.shape
        num_groups = offset_NOHW.shape[1] // 2
        sy_NGHW, sx_NGHW = sampling_coordinates(offset_NOHW, num_rows, num_columns, scale, base_grid)
        taps = find_taps(sy_NGHW, sx_NGHW, num_rows, num_columns)
        # Pieces of samples that fit the cache, channels last: a copy of the whole gradient would not.
        grad_BTP = grad_NCHW.reshape(num_images * num_groups, -1, sy_NGHW[0, 0].numel())
        table_BKT = cell_rows(x_NCYX, num_groups).view(len(grad_BTP), -1, grad_BTP.shape[1])
        total_BYXT = table_BKT.new_zeros(len(grad_BTP), num_rows, num_columns, grad_BTP.shape[1])
        weight_grads = []
        length = chunk_length(grad_BTP.shape[1], num_rows * num_columns)
        for index, grad_TP in enumerate(grad_BTP):
            for start in range(0, grad_TP.shape[1], length):
                piece = taps.piece(index, start, length, grad_TP.shape[1], num_rows * num_columns)
                part_TP = grad_TP[:, start : start + length].to(table_BKT.dtype)
                # PyTorch transposes in blocks only what is contiguous as a whole.
                part_TP = part_TP if part_TP.stride(0) == 1 else part_TP.contiguous()
                grad_PT = part_TP.t().contiguous()
                if ctx.needs_input_grad[0]:
                    add_scattered(total_BYXT[index], grad_PT, piece)
                if ctx.needs_input_grad[1]:
                    weight_grads.append(weight_gradient(table_BKT[index], piece, grad_PT))
        grad_x = grad_offset = None
        if ctx.needs_input_grad[0]:
            grad_x = rows_to_map(total_BYXT.flatten(0, 2), tuple(x_NCYX.shape), num_groups).to(x_NCYX.dtype)
        if ctx.needs_input_grad[1]:
            along_y, along_x = coordinate_gradient(torch.cat(weight_grads), taps)
            dy = limit_at_border(along_y.view_as(sy_NGHW), sy_NGHW, num_rows, border_gradient)
            dx = limit_at_border(along_x.view_as(sx_NGHW), sx_NGHW, num_columns, border_gradient)
            grad_offset = torch.cat([dy, dx], dim=1).to(offset_NOHW.dtype)
        return grad_x, grad_offset, None, None, None


def grid_sample_upsample(
    x_NCYX: Tensor,
    offset_NOHW: Tensor,
    *,
    scale_factor: int | tuple[int, int],
    base_grid: BaseGrid = "asymmetric",
) -> Tensor:
    """The same map through `F.grid_sample`: the form for ONNX and `torch.export`, and a check of the other.

    Values agree up to the rounding of the normalised grid. Gradients differ at whole coordinates (left or
    right slope at random) and on the border (none), and on CUDA they are not deterministic.

    Args:
        x_NCYX: Map to enlarge.
        offset_NOHW: Offsets as in `location_aware_upsample`.
        scale_factor: Up-sampling factor(s).
        base_grid: Where zero offsets sample.

    Returns:
        Map (N, C, H, W) in the dtype of `x_NCYX`.
    """
    num_images, num_channels, num_rows, num_columns = x_NCYX.shape
    num_groups = offset_NOHW.shape[1] // 2
    sy, sx = sampling_coordinates(offset_NOHW, num_rows, num_columns, scale_pair(scale_factor), base_grid)
    # One cell: the coordinate is 0 whatever the offset; dividing by 0 cells would make it NaN.
    gy = sy.clamp(0, num_rows - 1) * (2 / max(num_rows - 1, 1)) - 1
    gx = sx.clamp(0, num_columns - 1) * (2 / max(num_columns - 1, 1)) - 1
    grid = torch.stack([gx, gy], dim=-1).flatten(0, 1)
    maps = x_NCYX.reshape(num_images * num_groups, num_channels // num_groups, num_rows, num_columns)
    sampled = F.grid_sample(
        maps.to(grid.dtype), grid, mode="bilinear", padding_mode="border", align_corners=True
    )
    return sampled.view(num_images, num_channels, *offset_NOHW.shape[2:]).to(x_NCYX.dtype)


def _check(x_NCYX: Tensor, offset_NOHW: Tensor, scale: tuple[int, int]) -> None:
    shapes = f"x {tuple(x_NCYX.shape)} and offset {tuple(offset_NOHW.shape)}"
    if x_NCYX.dim() != 4 or offset_NOHW.dim() != 4:
        raise ValueError(f"x and offset must have four axes (N, C, H, W); got {shapes}.")
    if not x_NCYX.is_floating_point() or not offset_NOHW.is_floating_point():
        raise ValueError(
            f"x and offset must be floating point; got {x_NCYX.dtype} and {offset_NOHW.dtype} for {shapes}. "
            "Labels cannot be mixed bilinearly: convert logits or one-hot maps with .float()."
        )
    num_groups, odd = divmod(offset_NOHW.shape[1], 2)
    if odd or num_groups < 1 or x_NCYX.shape[1] % num_groups:
        raise ValueError(
            f"offset must have 2*G channels (G vertical, then G horizontal) with G a divisor of the channels "
            f"of x; got {shapes}."
        )
    needed = (x_NCYX.shape[0], x_NCYX.shape[2] * scale[0], x_NCYX.shape[3] * scale[1])
    if (offset_NOHW.shape[0], *offset_NOHW.shape[2:]) != needed:
        raise ValueError(
            f"offset must cover the enlarged map, (N, 2*G, H, W) with N, H, W = {needed}; got {shapes} at "
            f"scale_factor {scale}. Predict offsets with the same factor."
        )


def load_kernels(x: Tensor) -> ModuleType:
    """The module of Triton kernels, if it can work on `x`.

    Raises:
        ImportError: If triton is not installed.
        ValueError: If `x` lies where no kernel runs.
    """
    try:
        from mm_plugins.lau import kernels
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ImportError(
            "backend='triton' needs the package triton, which PyTorch's CUDA builds bring along. Install it "
            "(pip install triton), or use backend='auto'."
        ) from error
    if not (x.is_cuda or kernels.INTERPRETED):
        raise ValueError(
            f"backend='triton' needs tensors on a CUDA device; got {x.device}. Use backend='auto', or set "
            "TRITON_INTERPRET=1 before Python starts to try the kernels slowly on a CPU."
        )
    return kernels


def location_aware_upsample(
    x_NCYX: Tensor,
    offset_NOHW: Tensor,
    *,
    scale_factor: int | tuple[int, int],
    size: tuple[int, int] | None = None,
    base_grid: BaseGrid = "asymmetric",
    border_gradient: BorderGradient = "inclusive",
    backend: Backend = "auto",
) -> Tensor:
    """Sample a low-resolution map bilinearly at ``base + offset`` for every high-resolution pixel.

    For pixel (p, q): sy = base(p) + dy[p, q] and sx = base(q) + dx[p, q], both clamped to the map; the output
    is the bilinear mixture of the four cells around (sy, sx). Coordinates are fp32 whatever the dtype of `x`
    (fp64 if both inputs are fp64-ready), also under autocast. The slope at a whole coordinate is that towards
    the next cell (towards the one before at the last cell), and the border belongs to the map.

    Args:
        x_NCYX: Logits or features, any float dtype.
        offset_NOHW: Offsets (N, 2*G, k_h*Y, k_w*X) in cells: first G vertical, then G horizontal; channel c
            uses group ``c // (C/G)``. G = 1 is the paper's setting, G = C gives each channel its own.
        scale_factor: Whole factor k, or (k_h, k_w).
        size: Output (H, W) if smaller than k times the map: the lower right remainder is cut.
        base_grid: Where a zero offset samples; ``asymmetric`` (p/k) is the paper's.
        border_gradient: ``inclusive``: gradient on the closed map, 0 outside (the authors' rule).
            ``inward``: outside also where descent leads back.
        backend: ``rows`` (deterministic), ``grid_sample`` (for export), ``triton`` (CUDA kernels,
            deterministic), or ``auto``: rows, and grid_sample while a graph is exported.

    Returns:
        Map (N, C, H, W) in the dtype of `x`; from ``rows`` with channels_last strides when G = 1 (no copy is
        made). Never outside the range of `x`; NaN where the offset is NaN.

    Raises:
        ValueError: If shapes, dtypes or options do not fit, or ``triton`` is asked for on another device.
        ImportError: If ``triton`` is asked for and not installed.

    Source: LaU, arXiv 1911.05250, Section 3.1; coordinate rule of the authors' CUDA op, slopes at whole
    coordinates corrected.
    """
    scale = scale_pair(scale_factor)
    _check(x_NCYX, offset_NOHW, scale)
    for name, value, known in (
        ("base_grid", base_grid, BASE_GRIDS),
        ("border_gradient", border_gradient, BORDER_GRADIENTS),
        ("backend", backend, BACKENDS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}.")
    if size is not None:
        offset_NOHW = crop_offset(offset_NOHW, size)
    exporting = torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()
    if backend == "auto":
        backend = "grid_sample" if exporting else "rows"
    if backend == "grid_sample":
        return grid_sample_upsample(x_NCYX, offset_NOHW, scale_factor=scale, base_grid=base_grid)
    if backend == "triton":
        if exporting:
            raise ValueError(
                "backend='triton' cannot be exported. Set backend='auto', which exports F.grid_sample."
            )
        kernels = load_kernels(x_NCYX)
        return kernels.SampleKernels.apply(x_NCYX, offset_NOHW, scale, base_grid, border_gradient)
    return _SampleRows.apply(x_NCYX, offset_NOHW, scale, base_grid, border_gradient)


def crop_offset(offset_NOHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Upper left part of the offsets, for an output smaller than k times the map.

    Raises:
        ValueError: If the wanted size is larger than the offsets, or empty.
    """
    height, width = offset_NOHW.shape[2:]
    if not (0 < size[0] <= height and 0 < size[1] <= width):
        raise ValueError(
            f"size must lie within the enlarged map {(height, width)}; got {tuple(size)}. Raise "
            "scale_factor, or resize the output with F.interpolate."
        )
    return offset_NOHW[:, :, : size[0], : size[1]]
