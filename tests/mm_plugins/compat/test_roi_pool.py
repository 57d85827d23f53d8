"""RoI max pooling."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mm_plugins  # noqa: F401
from mm_plugins.compat.portable import roi_pool as core
from tests.mm_plugins.compat import reference
from tests.mm_plugins.compat.test_roi_align import ramp, random_case


def test_by_hand() -> None:
    """Region [1, 4) x [2, 4): bins of 1.5 x 1; columns [1, ceil 2.5) and [floor 2.5, 4), rows 2 and 3."""
    value, place = core.roi_pool(ramp(5, 5), torch.tensor([[0.0, 1, 2, 3, 3]]), output_size=(2, 2))
    assert value[0, 0].tolist() == [[22.0, 23.0], [32.0, 33.0]]
    assert place[0, 0].tolist() == [[12, 13], [17, 18]]


def test_empty_bins_are_zero() -> None:
    """Outside the map; turned inside out; without width, where rounded edges would hold a pixel."""
    rois = torch.tensor([[0.0, 50, 50, 60, 60], [0.0, 3, 3, 1, 1], [0.0, 1.5, 1, 0.5, 3]])
    value, place = core.roi_pool(ramp(5, 5) - 100, rois, output_size=(2, 2))
    assert torch.equal(value, torch.zeros(3, 1, 2, 2, dtype=torch.float64))
    assert torch.equal(place, torch.full((3, 1, 2, 2), -1, dtype=torch.int32))


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 999),
    num_rois=st.sampled_from([0, 1, 6]),
    scale=st.sampled_from([1.0, 0.25]),
    output_size=st.sampled_from([(1, 1), (2, 3), (5, 4)]),
    max_values=st.sampled_from([1, 1 << 24]),
)
def test_equals_reference_through_mmcv(
    seed: int, num_rois: int, scale: float, output_size: tuple[int, int], max_values: int
) -> None:
    """One value at a time means one region at a time."""
    from mmcv.ops import roi_pool

    maps, rois = random_case(seed, num_rois, scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "MAX_VALUES", max_values)
        got = roi_pool(maps, rois, output_size, scale)
    np.testing.assert_array_equal(got, reference.roi_pool(maps.numpy(), rois.numpy(), output_size, scale))


def test_gradient_through_mmcv() -> None:
    from mmcv.ops import RoIPool

    maps, rois = random_case(5, 4, 0.5)
    rois[0, 1:] = torch.tensor([90.0, 90, 95, 95])
    pool = RoIPool((2, 3), 0.5)
    assert torch.autograd.gradcheck(lambda x: pool(x, rois), (maps.requires_grad_(True),), fast_mode=True)


def test_half_precision_is_exact() -> None:
    maps, rois = random_case(5, 4, 0.5)
    half = maps.half()
    value, _ = core.roi_pool(half, rois.float(), output_size=(2, 3), spatial_scale=0.5)
    assert value.dtype == torch.float16
    expected, _ = core.roi_pool(half.double(), rois, output_size=(2, 3), spatial_scale=0.5)
    assert torch.equal(value.double(), expected)
