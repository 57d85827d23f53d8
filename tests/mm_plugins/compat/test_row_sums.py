"""Rows of a map, weighted sums of them with gradients, and bilinear corners."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mm_plugins  # noqa: F401
from mm_plugins.compat.portable import row_sums
from tests.mm_plugins.compat import reference

MAP = torch.arange(24.0).view(2, 3, 2, 2)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_rows_are_pixels(memory_format: torch.memory_format) -> None:
    """Row 5 is image 1, pixel (0, 1): values 12 + 1, 16 + 1, 20 + 1."""
    rows = row_sums.pixel_rows(MAP.to(memory_format=memory_format))
    assert rows.shape == (8, 3)
    assert rows[5].tolist() == [13.0, 17.0, 21.0]
    assert torch.equal(row_sums.rows_to_map(rows, 2, 2, 2), MAP)
    assert row_sums.pixel_rows(MAP[:0]).shape == (0, 3)


def test_half_precision_becomes_fp32() -> None:
    assert row_sums.pixel_rows(MAP.half()).dtype == torch.float32
    assert row_sums.pixel_rows(MAP.bfloat16()).dtype == torch.float32
    assert row_sums.pixel_rows(MAP.double()).dtype == torch.float64


def test_some_rows_are_the_same_rows_and_their_adjoint() -> None:
    pixels = torch.tensor([1, 2, 5])
    rows = row_sums.some_pixel_rows(MAP, pixels)
    assert torch.equal(rows, row_sums.pixel_rows(MAP)[pixels])
    added = row_sums.add_pixel_rows_(torch.ones_like(MAP), rows, pixels)
    assert torch.equal(row_sums.pixel_rows(added)[pixels], 1 + rows)
    assert added.sum() == 24 + rows.sum()


def test_rows_are_added_to_a_map() -> None:
    assert torch.equal(row_sums.add_rows_(MAP.clone(), row_sums.pixel_rows(MAP)), 2 * MAP)


def test_weighted_sum_by_hand() -> None:
    """2 * row 0 - 1 * row 2, and an empty set of sums."""
    table = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    got = row_sums.weighted_row_sum(table, torch.tensor([[0, 2]]), torch.tensor([[2.0, -1.0]]))
    assert got.tolist() == [[-3.0, -2.0]]
    assert row_sums.weighted_row_sum(
        table, torch.zeros(0, 2, dtype=torch.int32), torch.zeros(0, 2)
    ).shape == (0, 2)


def test_empty_sum_keeps_the_graph_and_ignores_infinities() -> None:
    table = torch.full((3, 2), torch.inf, requires_grad=True)
    got = row_sums.weighted_row_sum(table, torch.zeros(4, 0, dtype=torch.int32), torch.zeros(4, 0))
    assert torch.equal(got, torch.zeros(4, 2))
    (grad,) = torch.autograd.grad(got.sum(), table)
    assert torch.equal(grad, torch.zeros(3, 2))


def test_scatter_is_the_adjoint() -> None:
    """<sum(table), g> = <table, scatter(g)> for random entries, some rows hit often, some never."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    index = torch.randint(0, 7, (6, 5), generator=generator, dtype=torch.int32)
    weight = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    grad = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    bag = torch.arange(6, dtype=torch.int32)[:, None].expand(6, 5)
    left = (row_sums.weighted_row_sum(table, index, weight) * grad).sum()
    scattered = row_sums.weighted_row_scatter(grad, index.flatten(), bag.flatten(), weight.flatten(), 9)
    torch.testing.assert_close(left, (table * scattered).sum())
    assert torch.equal(scattered[7:], torch.zeros(2, 4, dtype=torch.float64))
    none = torch.zeros(0, dtype=torch.int32)
    assert torch.equal(
        row_sums.weighted_row_scatter(grad, none, none, grad[:0, 0], 3), torch.zeros(3, 4).double()
    )


def test_gradients_of_table_and_weight() -> None:
    table = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 1], [1, 1], [4, 2], [0, 4]], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda t, w: row_sums.weighted_row_sum(t, index, w), (table, weight))


COORDINATES = st.sampled_from(
    [-9.0, -1.01, -1.0, -0.99, -0.5, 0.0, 0.25, 1.0, 2.75, 3.0, 3.5, 4.0, 4.01, 5.0, 99.0]
)


def sampled(corners: tuple[Tensor, Tensor], plane: Tensor) -> float:
    index, weight = corners
    return float((plane.flatten()[index.long()] * weight).sum())


@settings(derandomize=True, deadline=None, max_examples=150)
@given(y=COORDINATES, x=COORDINATES, height=st.sampled_from([1, 4]), width=st.sampled_from([1, 5]))
def test_corners_sample_as_the_reference(y: float, x: float, height: int, width: int) -> None:
    plane = torch.arange(1.0, height * width + 1, dtype=torch.float64).view(height, width).sqrt()
    point = (torch.tensor(y, dtype=torch.float64), torch.tensor(x, dtype=torch.float64), height, width)
    zero_padded = reference.sample_zero_padded(plane.numpy(), y, x)
    np.testing.assert_allclose(sampled(row_sums.corners_zero_padded(*point), plane), zero_padded, atol=1e-12)
    clamped = reference.sample_clamped(plane.numpy(), y, x)
    np.testing.assert_allclose(sampled(row_sums.corners_clamped(*point), plane), clamped, atol=1e-12)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_wild_coordinates_weigh_nothing_and_stay_in_range(bad: float) -> None:
    y = torch.tensor([bad, 1.0], requires_grad=True)
    for corners in (row_sums.corners_zero_padded, row_sums.corners_clamped):
        index, weight = corners(y, torch.tensor([1.0, bad]), 3, 3)
        assert torch.equal(weight, torch.zeros(2, 4))
        assert int(index.min()) >= 0
        assert int(index.max()) < 9
        (grad,) = torch.autograd.grad(weight.sum(), y)
        assert torch.equal(grad, torch.zeros(2))


def test_exactly_one_pixel_outside_there_is_no_gradient() -> None:
    """At y = -1 the value is 0 and the upper neighbour would pull; mmcv counts the point as outside."""
    y = torch.tensor([-1.0, -0.5], requires_grad=True)
    index, weight = row_sums.corners_zero_padded(y, torch.zeros(2), 3, 3)
    (grad,) = torch.autograd.grad((torch.ones(9)[index.long()] * weight).sum(), y)
    assert grad.tolist() == [0.0, 1.0]
