"""The operator and the location loss as the paper and the authors' release state them: loops, fp64."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def base(p: int, factor: int, num_cells: int, base_grid: str) -> float:
    """Where pixel p samples with offset 0."""
    if base_grid == "half_pixel":
        return (p + 0.5) / factor - 0.5
    if base_grid == "align_corners":
        return p * (num_cells - 1) / max(factor * num_cells - 1, 1)
    return p / factor


def upsample(x: Tensor, offset: Tensor, scale: tuple[int, int], base_grid: str = "asymmetric") -> Tensor:
    """Section 3.1, pixel by pixel: clamp the coordinate, mix floor and ceil."""
    n, c, h, w = x.shape
    groups = offset.shape[1] // 2
    out = torch.zeros(n, c, *offset.shape[2:], dtype=torch.float64)
    for image in range(n):
        for channel in range(c):
            group = channel // (c // groups)
            for p in range(offset.shape[2]):
                for q in range(offset.shape[3]):
                    sy = base(p, scale[0], h, base_grid) + float(offset[image, group, p, q])
                    sx = base(q, scale[1], w, base_grid) + float(offset[image, groups + group, p, q])
                    sy, sx = min(max(sy, 0.0), h - 1.0), min(max(sx, 0.0), w - 1.0)
                    y0, x0, y1, x1 = math.floor(sy), math.floor(sx), math.ceil(sy), math.ceil(sx)
                    a, b = sy - y0, sx - x0
                    cell = x[image, channel].double()
                    out[image, channel, p, q] = (
                        (1 - a) * (1 - b) * cell[y0, x0]
                        + (1 - a) * b * cell[y0, x1]
                        + a * (1 - b) * cell[y1, x0]
                        + a * b * cell[y1, x1]
                    )
    return out


def corner_maps(x: Tensor, scale: tuple[int, int]) -> list[Tensor]:
    """The map enlarged four times by picking (floor, floor), (ceil, floor), (floor, ceil), (ceil, ceil)."""
    n, c, h, w = x.shape
    height, width = scale[0] * h, scale[1] * w
    maps = []
    for row_of, column_of in (
        (math.floor, math.floor),
        (math.ceil, math.floor),
        (math.floor, math.ceil),
        (math.ceil, math.ceil),
    ):
        rows = [min(row_of(p / scale[0]), h - 1) for p in range(height)]
        columns = [min(column_of(q / scale[1]), w - 1) for q in range(width)]
        maps.append(x[:, :, rows][:, :, :, columns])
    return maps


def nll(logits: Tensor, label: Tensor, ignore_index: int = 255) -> Tensor:
    """Cross entropy of each pixel, 0 where ignored."""
    return F.cross_entropy(logits, label, reduction="none", ignore_index=ignore_index)


def regression_loss(
    x: Tensor,
    offset: Tensor,
    sampled: Tensor,
    label: Tensor,
    scale: tuple[int, int],
    *,
    lambda_: float,
    gamma: float,
    margin: float = 1e-9,
    ignore_index: int = 255,
) -> dict[str, Tensor]:
    """The authors' regression loss: the enlarged map and four corner maps through a log-softmax each.

    `margin` keeps ties apart: a clamped sample is a corner's value, up to the last bits of two computations.
    """
    h, w = x.shape[2:]
    height, width = label.shape[1:]
    own = nll(sampled, label, ignore_index)
    best, target = own.detach().clone(), offset.detach().clone()
    p = torch.arange(height, dtype=torch.float64)[:, None].expand(height, width) / scale[0]
    q = torch.arange(width, dtype=torch.float64)[None, :].expand(height, width) / scale[1]
    places = [
        (p.floor(), q.floor()),
        (p.ceil().clamp(max=h - 1), q.floor()),
        (p.floor(), q.ceil().clamp(max=w - 1)),
        (p.ceil().clamp(max=h - 1), q.ceil().clamp(max=w - 1)),
    ]
    for corner, (y, x_) in zip(corner_maps(x.detach(), scale), places, strict=True):
        loss = nll(corner, label, ignore_index)
        better = loss < best - margin
        target[:, 0] = torch.where(better, (y - p).to(target), target[:, 0])
        target[:, 1] = torch.where(better, (x_ - q).to(target), target[:, 1])
        best = torch.where(better, loss, best)
    weight = 1 + lambda_ * (own.detach() > best).to(own)
    regression = gamma * F.smooth_l1_loss(offset, target)
    return {
        "main": (own * weight).mean(),
        "regression": regression,
        "weight": weight,
        "target": target,
        "own": own,
    }


def boundary_region(mask: list[list[bool]], depth: int) -> list[list[bool]]:
    """Mask pixels with a pixel outside the mask, or outside the image, within `depth` in both axes."""
    h, w = len(mask), len(mask[0])
    result = [[False] * w for _ in range(h)]
    for y in range(h):
        for x in range(w):
            if not mask[y][x]:
                continue
            for v in range(y - depth, y + depth + 1):
                for u in range(x - depth, x + depth + 1):
                    if not (0 <= v < h and 0 <= u < w) or not mask[v][u]:
                        result[y][x] = True
    return result
