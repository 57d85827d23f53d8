"""Colours, outlines and labels of a panoptic map."""

import numpy as np
import pytest

from mm_plugins.spatialflow.picture import labels, outlines, overlay

# Two instances of class 0, class 1 as stuff, void (2).
PANOPTIC = np.array([[1000, 1000, 2000], [1, 1, 2], [1, 1, 2]])
PALETTE = [(200, 0, 0), (0, 100, 0)]


def test_outlines_by_hand() -> None:
    assert outlines(PANOPTIC).astype(int).tolist() == [[1, 1, 1], [0, 1, 0], [0, 1, 0]]


def test_colours_by_hand() -> None:
    """Half of grey 100 and half of the colour: stuff (50, 100, 50); void stays; outlines are white."""
    grey = np.full((3, 3, 3), 100, np.uint8)
    picture = overlay(grey, PANOPTIC, PALETTE, strength=0.5)
    assert picture[1, 0].tolist() == [50, 100, 50]
    assert picture[2, 2].tolist() == [100, 100, 100]
    assert picture[0, 0].tolist() == [255, 255, 255]


def test_instances_of_one_class_differ() -> None:
    """Instance 1 has 0.88 and instance 2 has 0.76 of the colour's brightness."""
    wide = np.repeat([1000, 1000, 2000, 2000], 2)[None].repeat(2, 0)
    picture = overlay(np.zeros((2, 8, 3), np.uint8), wide, PALETTE, strength=1.0)
    assert picture[0, 0].tolist() == [176, 0, 0]
    assert picture[0, 6].tolist() == [152, 0, 0]


def test_labels_stand_inside_their_segment() -> None:
    """A ring has its centre of mass in the hole; its label stands on the ring."""
    ring = np.full((5, 5), 1)
    ring[1:4, 1:4] = 2
    (found,) = labels(ring, ["a", "ring"])
    assert found.text == "ring"
    assert ring[found.row, found.column] == 1
    assert [label.text for label in labels(PANOPTIC, ["thing", "stuff"])] == ["stuff", "thing", "thing"]
    assert [label.text for label in labels(PANOPTIC, ["thing", "stuff"], min_area=2)] == ["stuff", "thing"]


def test_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match="must have one size; got \\(2, 2\\) and \\(3, 3\\)"):
        overlay(np.zeros((2, 2, 3), np.uint8), PANOPTIC, PALETTE)
