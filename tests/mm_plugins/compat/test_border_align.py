"""BorderAlign."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mm_plugins  # noqa: F401
from mm_plugins.compat.portable.border_align import border_align
from tests.mm_plugins.compat import reference


def random_case(seed: int, num_boxes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(2, 12, 4, 5, generator=generator, dtype=torch.float64)
    start = torch.rand(2, num_boxes, 2, generator=generator, dtype=torch.float64) * 5 - 1
    size = torch.rand(2, num_boxes, 2, generator=generator, dtype=torch.float64) * 4
    return maps, torch.cat([start, start + size], 2)


def test_by_hand() -> None:
    """On the map 10 * y + x, box (1, 1, 3, 2): maxima top 13, left 21, bottom 23, right 23.

    Bottom and right start at (x2, y2), so that their maximum is sample 0; top and left end at theirs: 2.
    """
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    maps = (10 * y + x).expand(1, 4, 4, 4)
    value, place = border_align(maps, torch.tensor([[[1.0, 1, 3, 2]]]), pool_size=2)
    assert value.flatten().tolist() == [13.0, 21.0, 23.0, 23.0]
    assert place.flatten().tolist() == [2, 2, 0, 0]


@settings(derandomize=True, deadline=None, max_examples=15)
@given(seed=st.integers(0, 999), num_boxes=st.sampled_from([0, 1, 4]), pool_size=st.sampled_from([1, 3]))
def test_equals_reference_through_mmcv(seed: int, num_boxes: int, pool_size: int) -> None:
    from mmcv.ops import border_align as through_mmcv

    maps, boxes = random_case(seed, num_boxes)
    expected = reference.border_align(maps.numpy(), boxes.numpy(), pool_size)
    np.testing.assert_allclose(through_mmcv(maps, boxes, pool_size), expected, atol=1e-12)


def test_gradient_through_mmcv() -> None:
    from mmcv.ops import BorderAlign

    maps, boxes = random_case(2, 5)
    align = BorderAlign(3)
    assert torch.autograd.gradcheck(lambda x: align(x, boxes), (maps.requires_grad_(True),), fast_mode=True)
