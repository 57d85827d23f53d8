"""Masked convolution."""

import pytest
import torch
import torch.nn.functional as F

import mm_plugins  # noqa: F401
from mm_plugins.compat.portable.masked_conv import masked_columns, scatter_columns_


def test_columns_by_hand() -> None:
    """3 x 1 kernel, one row of padding, at (0, 1) of two columns: rows -1, 0, 1 of column 1."""
    plane = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    got = masked_columns(plane, torch.tensor([0]), torch.tensor([1]), kernel_size=(3, 1), padding=(1, 0))
    assert got.tolist() == [[0.0], [2.0], [4.0]]


def test_scatter_writes_the_chosen_positions_only() -> None:
    plane = torch.zeros(2, 2, 2)
    scatter_columns_(
        plane, torch.tensor([[5.0, 6.0], [7.0, 8.0]]), torch.tensor([0, 1]), torch.tensor([1, 0])
    )
    assert plane.tolist() == [[[0, 5], [6, 0]], [[0, 7], [8, 0]]]


@pytest.mark.parametrize(("kernel", "padding"), [((3, 3), (1, 1)), ((1, 3), (0, 1))])
def test_is_a_convolution_where_the_mask_is_set(kernel: tuple[int, int], padding: tuple[int, int]) -> None:
    from mmcv.ops import masked_conv2d

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 5, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 3, *kernel, generator=generator, dtype=torch.float64)
    bias = torch.randn(4, generator=generator, dtype=torch.float64)
    mask = torch.rand(1, 5, 6, generator=generator) > 0.5
    got = masked_conv2d(x, mask.double(), weight, bias, padding)
    torch.testing.assert_close(got, F.conv2d(x, weight, bias, padding=padding) * mask)
    assert torch.equal(masked_conv2d(x, mask.double() * 0, weight, bias, padding), torch.zeros_like(got))
