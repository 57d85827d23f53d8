"""A panoptic map as a picture: one colour a segment, outlines, and a place for each label."""

# Shapes: H x W pixels, 3 colour channels.
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mm_plugins.spatialflow.segment_ids import INSTANCE_OFFSET, predicted_segments


class Label(NamedTuple):
    """A segment's name in the picture."""

    text: str
    row: int
    column: int


def overlay(
    image_HW3: np.ndarray,
    panoptic_HW: np.ndarray,
    palette: Sequence[tuple[int, int, int]],
    *,
    strength: float = 0.55,
) -> np.ndarray:
    """The image with its segments coloured and outlined; void stays as it is.

    Instances of one class differ in brightness.

    Args:
        image_HW3: The image, uint8, in the channel order of the palette.
        panoptic_HW: ``label + 1000 * instance``.
        palette: A colour for each class; their number is the number of classes.
        strength: Share of the colour, in [0, 1].

    Returns:
        Picture (H, W, 3), uint8.

    Raises:
        ValueError: If the sizes differ.
    """
    if image_HW3.shape[:2] != panoptic_HW.shape:
        raise ValueError(
            f"image and panoptic map must have one size; got {image_HW3.shape[:2]} and {panoptic_HW.shape}. "
            "Predict with rescale=True."
        )
    out = image_HW3.astype(np.float64)
    ids, labels = predicted_segments(panoptic_HW, len(palette))
    for key, label in zip(ids.tolist(), labels.tolist(), strict=True):
        # Five steps of brightness, so that neighbours of one class can be told apart.
        shade = 1 - 0.12 * (key // INSTANCE_OFFSET % 5)
        mask = panoptic_HW == key
        out[mask] = (1 - strength) * out[mask] + strength * shade * np.array(palette[label])
    out[outlines(panoptic_HW)] = 255
    return out.round().clip(0, 255).astype(np.uint8)


def outlines(panoptic_HW: np.ndarray) -> np.ndarray:
    """Pixels whose right or lower neighbour belongs to another segment, bool (H, W)."""
    edge = np.zeros(panoptic_HW.shape, bool)
    edge[:, :-1] |= panoptic_HW[:, 1:] != panoptic_HW[:, :-1]
    edge[:-1] |= panoptic_HW[1:] != panoptic_HW[:-1]
    return edge


def labels(panoptic_HW: np.ndarray, classes: Sequence[str], *, min_area: int = 0) -> list[Label]:
    """Where to write the names: the segment's own pixel that is nearest to its centre of mass.

    Args:
        panoptic_HW: ``label + 1000 * instance``.
        classes: Names of the classes.
        min_area: Segments with fewer pixels get no name.

    Returns:
        One entry a segment, in the order of their ids.
    """
    found = []
    for key, label in zip(*predicted_segments(panoptic_HW, len(classes)), strict=True):
        rows, columns = np.nonzero(panoptic_HW == key)
        if len(rows) < min_area:
            continue
        nearest = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
        found.append(Label(classes[label], int(rows[nearest]), int(columns[nearest])))
    return found
