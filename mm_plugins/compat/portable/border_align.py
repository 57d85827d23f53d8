"""BorderAlign: maximum of bilinear samples along each side of a box."""

# Shapes: N images, C channels of one side, H x W pixels, K boxes of an image.
import torch
from torch import Tensor

from mm_plugins.compat.portable.row_sums import compute_dtype, corners_clamped, weighted_row_sum


def _side_points(boxes_NK4: Tensor, step: Tensor, pool_size: int) -> tuple[Tensor, Tensor]:
    """Coordinates y and x of the step-th sample of the sides top, left, bottom, right (dimension 2).

    Top and left start at (x1, y1), bottom and right go back from (x2, y2).
    """
    x1, y1, x2, y2 = (v[..., None] for v in boxes_NK4.to(compute_dtype(boxes_NK4.dtype)).unbind(-1))
    along_x, along_y = (x2 - x1) / pool_size, (y2 - y1) / pool_size
    top, left, bottom, right = step.to(x1.dtype).unbind(2)
    x = torch.stack((x1 + top * along_x, x1 + 0 * left, x2 - bottom * along_x, x2 + 0 * right), 2)
    y = torch.stack((y1 + 0 * top, y1 + left * along_y, y2 + 0 * bottom, y2 - right * along_y), 2)
    return y, x


def border_align(input_N4CHW: Tensor, boxes_NK4: Tensor, *, pool_size: int) -> tuple[Tensor, Tensor]:
    """Maximum along the four sides of every box, each side read from channels of its own.

    Args:
        input_N4CHW: Map of shape (N, 4*C, H, W): channels for top, left, bottom, right.
        boxes_NK4: Boxes (x1, y1, x2, y2) in pixels of the map.
        pool_size: Intervals on a side; pool_size + 1 points are sampled.

    Returns:
        Maxima of shape (N, C, K, 4) in the dtype of the input, and the number of the sample (int32).

    Source: BorderDet, arXiv 2007.11056, Eq. (2).
    """
    num_images, channels, height, width = input_N4CHW.shape
    channels //= 4
    steps = torch.arange(pool_size + 1, device=boxes_NK4.device).view(1, 1, 1, -1).expand(-1, -1, 4, -1)
    y, x = _side_points(boxes_NK4, steps, pool_size)
    index, weight = corners_clamped(y, x, height, width)
    image = torch.arange(num_images, device=index.device, dtype=index.dtype).view(-1, 1, 1, 1, 1) * (
        height * width
    )
    side = torch.arange(4, device=index.device, dtype=index.dtype).view(4, 1, 1)
    table = input_N4CHW.to(compute_dtype(input_N4CHW.dtype)).permute(0, 2, 3, 1).reshape(-1, channels)
    index = (index + image) * 4 + side
    values = weighted_row_sum(table, index.view(-1, 4), weight.view(-1, 4).to(table.dtype))
    best, place = values.view(*y.shape, channels).max(3)
    return best.permute(0, 3, 1, 2).to(input_N4CHW.dtype), place.permute(0, 3, 1, 2).int()


def border_align_adjoint(
    grad_NCK4: Tensor,
    boxes_NK4: Tensor,
    argmax_NCK4: Tensor,
    *,
    input_shape: tuple[int, int, int, int],
    pool_size: int,
) -> Tensor:
    """Gradient of `border_align` by its input: every side's gradient goes to the corners of its maximum.

    Args:
        grad_NCK4: Gradient by the maxima.
        boxes_NK4: Boxes, as there.
        argmax_NCK4: Numbers of the samples.
        input_shape: Shape (N, 4*C, H, W) of the input.
        pool_size: As there.

    Returns:
        Gradient of that shape, at least fp32.
    """
    num_images, all_channels, height, width = input_shape
    channels = all_channels // 4
    y, x = _side_points(boxes_NK4, argmax_NCK4.permute(0, 2, 3, 1), pool_size)
    index, weight = corners_clamped(y, x, height, width)
    image = torch.arange(num_images, device=index.device).view(-1, 1, 1, 1) * all_channels
    side = torch.arange(4, device=index.device).view(4, 1) * channels
    plane = image + side + torch.arange(channels, device=index.device)
    flat = plane[..., None] * (height * width) + index
    grad = grad_NCK4.to(compute_dtype(grad_NCK4.dtype)).permute(0, 2, 3, 1)[..., None] * weight
    zeros = grad.new_zeros(num_images * all_channels * height * width)
    return zeros.scatter_add_(0, flat.flatten(), grad.flatten()).view(input_shape)
