"""Point-wise spatial attention masks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mm_plugins  # noqa: F401
from mm_plugins.compat.portable.psa_mask import psa_mask
from tests.mm_plugins.compat import reference


def test_by_hand() -> None:
    """1 x 2 pixels, mask of 1 x 3: cell 1 is the pixel itself, 0 its left and 2 its right neighbour.

    Pixel 0 has cells (1, 2, 3), pixel 1 has (4, 5, 6). From source 0 to target 1 leads cell 2 of pixel 0
    (value 3), from source 1 to target 0 cell 0 of pixel 1 (value 4). Collect: [target, source].
    """
    masks = torch.tensor([[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]).view(1, 3, 1, 2)
    collected = psa_mask(masks, mask_size=(1, 3), distribute=False)
    assert collected.view(2, 2).tolist() == [[2.0, 4.0], [3.0, 5.0]]
    assert torch.equal(
        psa_mask(masks, mask_size=(1, 3), distribute=True).view(2, 2), collected.view(2, 2).t()
    )


@settings(derandomize=True, deadline=None, max_examples=20)
@given(
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    mask_size=st.sampled_from([(1, 1), (3, 5), (9, 7), (2, 4)]),
    kind=st.sampled_from(["collect", "distribute"]),
)
def test_equals_reference_through_mmcv(
    height: int, width: int, mask_size: tuple[int, int], kind: str
) -> None:
    from mmcv.ops import PSAMask

    cells = mask_size[0] * mask_size[1]
    masks = torch.arange(1.0, 2 * cells * height * width + 1).view(2, cells, height, width)
    got = PSAMask(kind, mask_size)(masks)
    np.testing.assert_array_equal(got, reference.psa_mask(masks.numpy(), mask_size, kind == "distribute"))


@pytest.mark.parametrize("kind", ["collect", "distribute"])
def test_gradient_through_mmcv(kind: str) -> None:
    from mmcv.ops import PSAMask

    masks = torch.randn(2, 15, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(PSAMask(kind, (3, 5)), (masks,), fast_mode=True)
