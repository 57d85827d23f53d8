"""Segment ids of the COCO panoptic format: three bytes of a PNG, and mmdet's label + 1000 * instance."""

# Shapes: H x W pixels, 3 colour channels, S segments.
import numpy as np

VOID = 0
"""Id of unlabelled pixels in an annotation PNG."""
INSTANCE_OFFSET = 1000
"""mmdet's encoding of a predicted segment: label + INSTANCE_OFFSET * instance."""


def decode_png(rgb_HW3: np.ndarray) -> np.ndarray:
    """Segment ids of an annotation PNG: ``R + 256 G + 65536 B``.

    Args:
        rgb_HW3: Decoded picture, uint8, channels red, green, blue.

    Returns:
        Ids (H, W), int64, in [0, 2**24).

    Raises:
        ValueError: If the picture has no three channels of bytes.

    Source: COCO panoptic format, https://cocodataset.org/#format-data.
    """
    if rgb_HW3.ndim != 3 or rgb_HW3.shape[2] != 3 or rgb_HW3.dtype != np.uint8:
        raise ValueError(
            f"a panoptic PNG has three channels of 8 bits; got shape {rgb_HW3.shape}, {rgb_HW3.dtype}. "
            "A one-channel semantic map is another format: convert it to ids R + 256 G + 65536 B first."
        )
    weight = np.array([1, 256, 65536], dtype=np.int64)
    return rgb_HW3.astype(np.int64) @ weight


def encode_png(ids_HW: np.ndarray) -> np.ndarray:
    """The picture of segment ids; inverse of `decode_png`.

    Args:
        ids_HW: Ids in [0, 2**24), any integer dtype.

    Returns:
        Red, green, blue (H, W, 3), uint8.

    Raises:
        ValueError: If an id needs more than three bytes.
    """
    if ids_HW.size and not (0 <= ids_HW.min() and ids_HW.max() < 2**24):
        raise ValueError(
            f"segment ids must lie in [0, 2**24); got {ids_HW.min()} to {ids_HW.max()}. Number the segments "
            "of each image anew, from 1."
        )
    ids_HW = ids_HW.astype(np.int64)
    return np.stack([ids_HW & 255, ids_HW >> 8 & 255, ids_HW >> 16], axis=-1).astype(np.uint8)


def predicted_segments(panoptic_HW: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Segments of a predicted map in mmdet's encoding.

    Args:
        panoptic_HW: ``label + 1000 * instance``, integers >= 0; a label >= `num_classes` is void.
        num_classes: Things and stuff together, < 1000.

    Returns:
        Ids (S,) in ascending order and their labels (S,).
    """
    # A panoptic map is piecewise constant: only the ends of runs need sorting.
    flat = panoptic_HW.ravel()
    ends = np.flatnonzero(np.diff(flat)) if flat.size else flat
    ids_S = np.unique(np.append(flat[ends], flat[-1:])).astype(np.int64)
    labels_S = ids_S % INSTANCE_OFFSET
    return ids_S[labels_S < num_classes], labels_S[labels_S < num_classes]
