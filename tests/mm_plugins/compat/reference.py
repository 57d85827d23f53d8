"""The ops written down literally: loops over every element, float64, no tricks."""

import math
from collections.abc import Callable

import numpy as np

Sampler = Callable[[np.ndarray, float, float], float]


def sample_zero_padded(plane: np.ndarray, y: float, x: float) -> float:
    """Bilinear value on a plane that is zero outside; zero at or beyond one pixel outside."""
    height, width = plane.shape
    if y <= -1 or x <= -1 or y >= height or x >= width:
        return 0.0
    total = 0.0
    top, left = math.floor(y), math.floor(x)
    for row, row_weight in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, column_weight in ((left, 1 - (x - left)), (left + 1, x - left)):
            if 0 <= row < height and 0 <= column < width:
                total += row_weight * column_weight * plane[row, column]
    return total


def sample_clamped(plane: np.ndarray, y: float, x: float) -> float:
    """Bilinear value with the point moved onto the plane; zero further than one pixel outside."""
    height, width = plane.shape
    if y < -1 or x < -1 or y > height or x > width:
        return 0.0
    return sample_zero_padded(plane, min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0))


def iou(a: np.ndarray, b: np.ndarray, offset: int, mode: str = "iou") -> float:
    width = max(min(a[2], b[2]) - max(a[0], b[0]) + offset, 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]) + offset, 0)
    area_a = (a[2] - a[0] + offset) * (a[3] - a[1] + offset)
    area_b = (b[2] - b[0] + offset) * (b[3] - b[1] + offset)
    below = area_a if mode == "iof" else area_a + area_b - width * height
    return width * height / below if below else math.nan


def by_score(scores: np.ndarray) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i])


def nms(boxes: np.ndarray, scores: np.ndarray, threshold: float, offset: int) -> list[int]:
    keep: list[int] = []
    for i in by_score(scores):
        if not any(iou(boxes[k], boxes[i], offset) > threshold for k in keep):
            keep.append(i)
    return keep


def nms_match(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[list[int]]:
    left, groups = by_score(scores), []
    while left:
        best, *others = left
        hit = [i for i in others if iou(boxes[best], boxes[i], 0) >= threshold]
        groups.append([best, *hit])
        left = [i for i in others if i not in hit]
    return groups


def soft_nms(
    boxes: np.ndarray,
    scores: np.ndarray,
    threshold: float,
    sigma: float,
    min_score: float,
    method: str,
    offset: int,
) -> list[tuple[int, float]]:
    """Pairs (index, lowered score) in the order taken; scores must differ."""
    left = dict(enumerate(scores.tolist()))
    taken = []
    while left:
        best = max(left, key=lambda i: left[i])
        taken.append((best, left.pop(best)))
        for i in list(left):
            overlap = iou(boxes[best], boxes[i], offset)
            if method == "gaussian":
                left[i] *= math.exp(-(overlap**2) / sigma)
            elif overlap >= threshold:
                left[i] *= 1 - overlap if method == "linear" else 0.0
            if left[i] < min_score:
                del left[i]
    return taken


def bin_samples(start: float, length: float, num_bins: int, index: int, count: int) -> list[float]:
    size = length / num_bins
    return [start + index * size + (i + 0.5) * size / count for i in range(count)]


def roi_align(
    maps: np.ndarray,
    rois: np.ndarray,
    output_size: tuple[int, int],
    scale: float,
    sampling_ratio: int,
    mode: str,
    aligned: bool,
    offset: np.ndarray | None = None,
    gamma: float = 0.0,
) -> np.ndarray:
    """RoIAlign; with an offset (R, 2, P, Q) in (x, y) order, deformable RoI pooling."""
    out = np.zeros((len(rois), maps.shape[1], *output_size))
    for r, (image, *corners) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (c * scale - (0.5 if aligned else 0.0) for c in corners)
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = max(width, 1.0), max(height, 1.0)
        count_y = sampling_ratio or max(math.ceil(height / output_size[0]), 0)
        count_x = sampling_ratio or max(math.ceil(width / output_size[1]), 0)
        for c, p, q in np.ndindex(*out.shape[1:]):
            dx, dy = (0.0, 0.0) if offset is None else gamma * np.array((width, height)) * offset[r, :, p, q]
            ys = bin_samples(y1 + dy, height, output_size[0], p, count_y)
            xs = bin_samples(x1 + dx, width, output_size[1], q, count_x)
            values = [sample_clamped(maps[int(image), c], y, x) for y in ys for x in xs]
            if values:
                out[r, c, p, q] = max(values) if mode == "max" else sum(values) / len(values)
    return out


def roi_pool(maps: np.ndarray, rois: np.ndarray, output_size: tuple[int, int], scale: float) -> np.ndarray:
    height, width = maps.shape[2:]
    out = np.zeros((len(rois), maps.shape[1], *output_size))
    for r, (image, x1, y1, x2, y2) in enumerate(rois.tolist()):
        left, top = x1 * scale, y1 * scale
        box_w, box_h = (x2 + 1) * scale - left, (y2 + 1) * scale - top
        if box_w <= 0 or box_h <= 0:
            continue
        bin_h, bin_w = box_h / output_size[0], box_w / output_size[1]
        for c, p, q in np.ndindex(*out.shape[1:]):
            rows = [math.floor(p * bin_h + top), math.ceil((p + 1) * bin_h + top)]
            first_y, last_y = (min(max(v, 0), height) for v in rows)
            columns = [math.floor(q * bin_w + left), math.ceil((q + 1) * bin_w + left)]
            first_x, last_x = (min(max(v, 0), width) for v in columns)
            patch = maps[int(image), c, first_y:last_y, first_x:last_x]
            out[r, c, p, q] = patch.max() if patch.size else 0.0
    return out


def border_align(maps: np.ndarray, boxes: np.ndarray, pool_size: int) -> np.ndarray:
    num_images, channels = maps.shape[0], maps.shape[1] // 4
    out = np.zeros((num_images, channels, boxes.shape[1], 4))
    for n, c, k in np.ndindex(*out.shape[:3]):
        x1, y1, x2, y2 = boxes[n, k]
        shares = [i / pool_size for i in range(pool_size + 1)]
        sides = (
            [(y1, x1 + s * (x2 - x1)) for s in shares],
            [(y1 + s * (y2 - y1), x1) for s in shares],
            [(y2, x2 - s * (x2 - x1)) for s in shares],
            [(y2 - s * (y2 - y1), x2) for s in shares],
        )
        for side, points in enumerate(sides):
            plane = maps[n, side * channels + c]
            out[n, c, k, side] = max(sample_clamped(plane, y, x) for y, x in points)
    return out


def deform_conv(
    maps: np.ndarray,
    offset: np.ndarray,
    mask: np.ndarray | None,
    weight: np.ndarray,
    bias: np.ndarray | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    deform_groups: int,
) -> np.ndarray:
    num_images, channels = maps.shape[:2]
    num_out, channels_of_group, kernel_h, kernel_w = weight.shape
    out = np.zeros((num_images, num_out, *offset.shape[2:]))
    for n, o, p, q in np.ndindex(*out.shape):
        total = 0.0 if bias is None else bias[o]
        first = o // (num_out // groups) * channels_of_group
        for c, i, j in np.ndindex(channels_of_group, kernel_h, kernel_w):
            group = (first + c) // (channels // deform_groups)
            tap = (group * kernel_h + i) * kernel_w + j
            y = p * stride[0] - padding[0] + i * dilation[0] + offset[n, 2 * tap, p, q]
            x = q * stride[1] - padding[1] + j * dilation[1] + offset[n, 2 * tap + 1, p, q]
            factor = 1.0 if mask is None else mask[n, tap, p, q]
            total += weight[o, c, i, j] * factor * sample_zero_padded(maps[n, first + c], y, x)
        out[n, o, p, q] = total
    return out


def ms_deform_attn(
    value: np.ndarray, shapes: list[tuple[int, int]], locations: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    num_images, _, num_heads, dim = value.shape
    out = np.zeros((num_images, locations.shape[1], num_heads, dim))
    for n, q, m, d in np.ndindex(*out.shape):
        start = 0
        for level, (height, width) in enumerate(shapes):
            plane = value[n, start : start + height * width, m, d].reshape(height, width)
            for point in range(weights.shape[-1]):
                x, y = locations[n, q, m, level, point]
                sampled = sample_zero_padded(plane, y * height - 0.5, x * width - 0.5)
                out[n, q, m, d] += weights[n, q, m, level, point] * sampled
            start += height * width
    return out.reshape(num_images, -1, num_heads * dim)


def carafe(maps: np.ndarray, masks: np.ndarray, kernel_size: int, groups: int, scale: int) -> np.ndarray:
    num_images, channels, height, width = maps.shape
    out = np.zeros((num_images, channels, height * scale, width * scale))
    half = (kernel_size - 1) // 2
    for n, c, y, x in np.ndindex(*out.shape):
        group = c // (channels // groups)
        for i, j in np.ndindex(kernel_size, kernel_size):
            row, column = y // scale + i - half, x // scale + j - half
            if 0 <= row < height and 0 <= column < width:
                cell = (group * kernel_size + i) * kernel_size + j
                out[n, c, y, x] += masks[n, cell, y, x] * maps[n, c, row, column]
    return out


def psa_mask(masks: np.ndarray, mask_size: tuple[int, int], distribute: bool) -> np.ndarray:
    num_images, _, height, width = masks.shape
    out = np.zeros((num_images, height * width, height, width))
    for n, h, w, i, j in np.ndindex(num_images, height, width, *mask_size):
        row, column = h + i - (mask_size[0] - 1) // 2, w + j - (mask_size[1] - 1) // 2
        if 0 <= row < height and 0 <= column < width:
            value = masks[n, i * mask_size[1] + j, h, w]
            if distribute:
                out[n, h * width + w, row, column] = value
            else:
                out[n, row * width + column, h, w] = value
    return out


def sigmoid_focal(logit: float, is_target: bool, gamma: float, alpha: float) -> float:
    p = 1 / (1 + math.exp(-logit))
    if is_target:
        return -alpha * (1 - p) ** gamma * math.log(p)
    return -(1 - alpha) * p**gamma * math.log(1 - p)


def softmax_focal(logits: list[float], target: int, gamma: float, alpha: float) -> float:
    p = math.exp(logits[target]) / sum(math.exp(v) for v in logits)
    return -alpha * (1 - p) ** gamma * math.log(p)
