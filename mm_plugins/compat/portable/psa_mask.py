"""Point-wise spatial attention: the over-complete mask of every position, laid over the feature map."""

# Shapes: N images, K = mask_h * mask_w mask cells, H x W pixels.
from collections.abc import Iterator

import torch
from torch import Tensor


def _cells(
    height: int, width: int, mask_size: tuple[int, int], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each target row: mask cell of (target column, source row, source column), and if it exists."""
    mask_h, mask_w = mask_size
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    cell_x_WW = columns[:, None] - columns[None, :] + (mask_w - 1) // 2
    x_ok_WW = (cell_x_WW >= 0) & (cell_x_WW < mask_w)
    for target_row in range(height):
        cell_y_H = target_row - rows + (mask_h - 1) // 2
        ok = ((cell_y_H >= 0) & (cell_y_H < mask_h))[None, :, None] & x_ok_WW[:, None, :]
        yield torch.where(ok, cell_y_H[None, :, None] * mask_w + cell_x_WW[:, None, :], 0), ok


def _by_target(output: Tensor, height: int, width: int, distribute: bool) -> Tensor:
    """View of the attention (N, target row, target column, source row, source column), written through."""
    view = output.view(len(output), height, width, height, width)
    return view.permute(0, 3, 4, 1, 2) if distribute else view


def psa_mask(input_NKHW: Tensor, *, mask_size: tuple[int, int], distribute: bool) -> Tensor:
    """Attention between all pairs of pixels from a mask centred on each pixel.

    The mask of source pixel s, shifted so that its centre lies on s, says how s is tied to target pixel t.

    Args:
        input_NKHW: Mask of every source pixel; cells in rows, ``mask_h * mask_w`` of them.
        mask_size: Cells (rows, columns).
        distribute: False ("collect"): dimension 1 of the result is the target and (H, W) the source.
            True ("distribute"): dimension 1 is the source and (H, W) the target.

    Returns:
        Tensor of shape (N, H*W, H, W); 0 where the mask does not reach.

    Source: PSANet, ECCV 2018, section 3.2.
    """
    num_images, _, height, width = input_NKHW.shape
    output = input_NKHW.new_zeros(num_images, height * width, height, width)
    by_target = _by_target(output, height, width, distribute)
    for row, (cell, ok) in enumerate(_cells(height, width, mask_size, input_NKHW.device)):
        by_target[:, row] = input_NKHW.gather(1, cell.expand(num_images, -1, -1, -1)) * ok
    return output


def psa_mask_adjoint(grad_output: Tensor, *, mask_size: tuple[int, int], distribute: bool) -> Tensor:
    """Gradient of `psa_mask` by its input, shape (N, K, H, W); arguments as there."""
    num_images, _, height, width = grad_output.shape
    grad = grad_output.new_zeros(num_images, mask_size[0] * mask_size[1], height, width)
    by_target = _by_target(grad_output.contiguous(), height, width, distribute)
    for row, (cell, ok) in enumerate(_cells(height, width, mask_size, grad.device)):
        grad.scatter_add_(1, cell.expand(num_images, -1, -1, -1), by_target[:, row] * ok)
    return grad
