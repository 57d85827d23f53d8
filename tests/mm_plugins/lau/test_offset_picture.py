"""Colours and arrows of offsets."""

import torch

from mm_plugins.lau.offset_picture import arrow_points, colour_wheel, wheel_colours


def test_colours_by_hand() -> None:
    """No offset is white, right is red, left is its complement cyan, twice the largest is no stronger."""
    dy = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0]])
    dx = torch.tensor([[0.0, 1.0, -1.0, 2.0, 0.5]])
    colours = wheel_colours(dy, dx, 1.0)[0].tolist()
    assert colours == [[255, 255, 255], [255, 0, 0], [0, 255, 255], [255, 0, 0], [255, 128, 128]]


def test_down_is_between_red_and_green() -> None:
    """A quarter turn is hue 1/4: half way between yellow and green."""
    assert wheel_colours(torch.ones(1, 1), torch.zeros(1, 1), 1.0)[0, 0].tolist() == [128, 255, 0]


def test_wheel_is_white_in_the_middle_and_outside() -> None:
    wheel = colour_wheel(33)
    assert wheel.shape == (33, 33, 3)
    assert wheel[16, 16].tolist() == [255, 255, 255]
    assert wheel[0, 0].tolist() == [255, 255, 255]
    assert wheel[16, 32].tolist() == [255, 0, 0]


def test_arrows_point_where_the_pixel_samples() -> None:
    """Cells of 8x4 pixels: half a cell down is 4 pixels, one cell left is 4 pixels."""
    offset = torch.zeros(2, 6, 8)
    offset[0], offset[1] = 0.5, -1.0
    rows = arrow_points(offset, 4, (8.0, 4.0)).tolist()
    assert rows == [[2, 2, 6, -2], [2, 6, 6, 2]]
