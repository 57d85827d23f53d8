"""Offsets as colours: the direction is the hue, the length is the strength."""

# Shapes: H x W pixels, 3 colour channels.
import math

import torch
from torch import Tensor


def wheel_colours(dy_HW: Tensor, dx_HW: Tensor, largest: float) -> Tensor:
    """Colour of every offset: white for none, full colour for `largest` and beyond.

    Args:
        dy_HW: Vertical offsets, positive down.
        dx_HW: Horizontal offsets, positive right.
        largest: Length that gets full colour, > 0.

    Returns:
        RGB (H, W, 3), uint8. Right is red, down yellow-green, left cyan, up violet.
    """
    hue_HW = torch.atan2(dy_HW, dx_HW) / (2 * math.pi) % 1.0
    strength_HW = (torch.hypot(dy_HW, dx_HW) / max(largest, 1e-12)).clamp(0, 1)
    # Hue to RGB with three shifted triangles; strength mixes with white.
    thirds_3 = torch.tensor([0.0, 4.0, 2.0], dtype=hue_HW.dtype, device=hue_HW.device)
    pure_HW3 = ((6 * hue_HW[..., None] + thirds_3) % 6 - 3).abs().sub(1).clamp(0, 1)
    return (255 * (1 - strength_HW[..., None] * (1 - pure_HW3))).round().to(torch.uint8)


def colour_wheel(side: int) -> Tensor:
    """The legend (side, side, 3): a disc; each point has the colour of the offset from the centre to it."""
    axis = torch.linspace(-1, 1, side)
    dy, dx = torch.meshgrid(axis, axis, indexing="ij")
    colours = wheel_colours(dy, dx, 1.0)
    return torch.where((torch.hypot(dy, dx) <= 1)[..., None], colours, torch.full_like(colours, 255))


def arrow_points(offset_2HW: Tensor, step: int, pixels_per_cell: tuple[float, float]) -> Tensor:
    """Arrows on a regular grid, from pixels to the points that their offsets move them to.

    Args:
        offset_2HW: Offsets in cells at image resolution, vertical first.
        step: Pixels between two arrows.
        pixels_per_cell: Height and width of a low-resolution cell in pixels.

    Returns:
        Rows (y0, x0, y1, x1) in pixels.
    """
    height, width = offset_2HW.shape[1:]
    y, x = torch.meshgrid(
        torch.arange(step // 2, height, step), torch.arange(step // 2, width, step), indexing="ij"
    )
    dy, dx = offset_2HW[:, y, x]
    ends = (y + dy * pixels_per_cell[0], x + dx * pixels_per_cell[1])
    return torch.stack([y.float(), x.float(), *ends], dim=-1).reshape(-1, 4)
