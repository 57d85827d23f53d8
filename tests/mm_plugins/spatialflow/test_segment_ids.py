"""Ids in PNGs and in predicted maps."""

import numpy as np
import pytest

from mm_plugins.spatialflow.segment_ids import decode_png, encode_png, predicted_segments


def test_decoding_by_hand() -> None:
    """R + 256 G + 65536 B: (1, 2, 3) is 1 + 512 + 196608 = 197121."""
    picture = np.array([[[1, 2, 3], [0, 0, 0]], [[255, 255, 255], [7, 0, 0]]], np.uint8)
    assert decode_png(picture).tolist() == [[197121, 0], [2**24 - 1, 7]]


def test_encoding_is_the_inverse() -> None:
    ids = np.random.default_rng(0).integers(0, 2**24, size=(9, 11))
    assert np.array_equal(decode_png(encode_png(ids)), ids)
    assert encode_png(np.zeros((0, 4), int)).shape == (0, 4, 3)


def test_other_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="convert it to ids R \\+ 256 G"):
        decode_png(np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match="has three channels of 8 bits"):
        decode_png(np.zeros((4, 4, 3), np.uint16))
    with pytest.raises(ValueError, match="Number the segments of each image anew"):
        encode_png(np.array([[2**24]]))


def test_predicted_segments_leave_void_out() -> None:
    """7 classes: 1003 and 2003 are instances of class 3, 5 is stuff, 7 and 1008 are void."""
    panoptic = np.array([[7, 7, 2003], [1003, 5, 5], [1003, 5, 1008]])
    ids, labels = predicted_segments(panoptic, 7)
    assert ids.tolist() == [5, 1003, 2003]
    assert labels.tolist() == [5, 3, 3]
    # The last run counts as well.
    assert predicted_segments(np.array([[7, 4]]), 7)[0].tolist() == [4]
    assert predicted_segments(np.zeros((0, 3), int), 7)[0].tolist() == []
