"""Columns of a convolution at chosen positions only, and their way back into a map."""

# Shapes: C input and O output channels, H x W pixels, M chosen positions, K taps of the kernel.
import torch
import torch.nn.functional as F
from torch import Tensor


def masked_columns(
    map_CHW: Tensor,
    row_M: Tensor,
    column_M: Tensor,
    *,
    kernel_size: tuple[int, int],
    padding: tuple[int, int],
) -> Tensor:
    """Values under the kernel at the chosen output positions of a stride-1 convolution.

    Args:
        map_CHW: Feature map, read as zero outside.
        row_M: Rows of the output positions.
        column_M: Columns of the output positions.
        kernel_size: Taps (rows, columns).
        padding: Zeros around the map in pixels.

    Returns:
        Columns of shape (C*K, M).
    """
    channels = map_CHW.shape[0]
    padded = F.pad(map_CHW, (padding[1], padding[1], padding[0], padding[0]))
    rows = row_M + torch.arange(kernel_size[0], device=row_M.device)[:, None]
    columns = column_M + torch.arange(kernel_size[1], device=row_M.device)[:, None]
    index_KM = (rows[:, None] * padded.shape[2] + columns).flatten()
    return (
        padded.flatten(1).index_select(1, index_KM).view(-1, len(row_M))
        if channels
        else map_CHW.new_zeros(0, 0)
    )


def scatter_columns_(map_OHW: Tensor, values_OM: Tensor, row_M: Tensor, column_M: Tensor) -> Tensor:
    """Write the values of the chosen positions into the map, which is changed in place and returned."""
    map_OHW[:, row_M, column_M] = values_OM
    return map_OHW
