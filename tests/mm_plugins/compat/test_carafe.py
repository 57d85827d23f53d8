"""CARAFE upsampling."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mm_plugins  # noqa: F401
from mm_plugins.compat.portable import ext_signatures
from mm_plugins.compat.portable.carafe import carafe
from tests.mm_plugins.compat import reference


def random_case(seed: int, kernel_size: int, groups: int, scale: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(2, 4, 3, 4, generator=generator, dtype=torch.float64)
    cells = groups * kernel_size**2
    masks = torch.randn(2, cells, 3 * scale, 4 * scale, generator=generator, dtype=torch.float64)
    return maps, masks


def test_by_hand() -> None:
    """One-hot kernels on the left neighbour (cell 3 of 9): outputs read the pixel left of their source."""
    maps = torch.tensor([[1.0, 2.0, 3.0]]).view(1, 1, 1, 3)
    masks = torch.zeros(1, 9, 2, 6)
    masks[:, 3] = 1.0
    got = carafe(maps, masks, kernel_size=3, group_size=1, scale_factor=2)
    assert got.view(2, 6).tolist() == [[0.0, 0.0, 1.0, 1.0, 2.0, 2.0]] * 2


@settings(derandomize=True, deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 999),
    kernel_size=st.sampled_from([1, 3, 5]),
    groups=st.sampled_from([1, 2, 4]),
    scale=st.sampled_from([1, 2]),
)
def test_both_entries(seed: int, kernel_size: int, groups: int, scale: int) -> None:
    from mmcv.ops import carafe as through_mmcv
    from mmcv.ops import carafe_naive

    maps, masks = random_case(seed, kernel_size, groups, scale)
    expected = reference.carafe(maps.numpy(), masks.numpy(), kernel_size, groups, scale)
    np.testing.assert_allclose(through_mmcv(maps, masks, kernel_size, groups, scale), expected, atol=1e-12)
    np.testing.assert_allclose(carafe_naive(maps, masks, kernel_size, groups, scale), expected, atol=1e-12)


def test_gradients_through_mmcv() -> None:
    from mmcv.ops import CARAFE

    maps, masks = (v.requires_grad_(True) for v in random_case(3, 3, 2, 2))
    assert torch.autograd.gradcheck(CARAFE(3, 2, 2), (maps, masks), fast_mode=True)


def test_naive_gradients_equal() -> None:
    """mmcv.ops lets only CUDA tensors through to the naive backward call, so that is called itself."""
    maps, masks = random_case(3, 3, 2, 2)
    top = torch.randn(2, 4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grads = [torch.zeros_like(v) for v in (maps, masks)]
    ext_signatures.carafe_naive_backward(
        top, maps, masks, *grads, kernel_size=3, group_size=2, scale_factor=2
    )
    leaves = [v.clone().requires_grad_(True) for v in (maps, masks)]
    expected = torch.autograd.grad(carafe(*leaves, kernel_size=3, group_size=2, scale_factor=2), leaves, top)
    for got, want in zip(grads, expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_fp32(dtype: torch.dtype) -> None:
    maps, masks = (v.to(dtype) for v in random_case(1, 3, 1, 2))
    got = carafe(maps, masks, kernel_size=3, group_size=1, scale_factor=2)
    assert got.dtype == dtype
    full = carafe(maps.float(), masks.float(), kernel_size=3, group_size=1, scale_factor=2)
    torch.testing.assert_close(got.float(), full, rtol=torch.finfo(dtype).eps / 2, atol=1e-6)
