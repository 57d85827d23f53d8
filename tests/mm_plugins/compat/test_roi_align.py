"""RoIAlign (mean and maximum) and deformable RoI pooling."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mm_plugins  # noqa: F401
from mm_plugins.compat.portable import roi_align as core
from tests.mm_plugins.compat import reference


def ramp(height: int, width: int) -> Tensor:
    """One map whose value is 10 * y + x, so that every bilinear sample inside reads its own coordinates."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (10 * y + x).to(torch.float64)[None, None]


def random_case(seed: int, num_rois: int, scale: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(2, 3, 6, 7, generator=generator, dtype=torch.float64)
    start = torch.rand(num_rois, 2, generator=generator, dtype=torch.float64) * 9 - 2
    size = torch.rand(num_rois, 2, generator=generator, dtype=torch.float64) * 9
    image = torch.randint(0, 2, (num_rois, 1), generator=generator).double()
    return maps, torch.cat([image, start / scale, (start + size) / scale], 1)


def test_mean_of_a_ramp_by_hand() -> None:
    """Region [2, 6] x [1, 5], aligned: the first bin's centre is (2, 3) - 0.5 -> 10 * 1.5 + 2.5."""
    rois = torch.tensor([[0.0, 2, 1, 6, 5]], dtype=torch.float64)
    got = core.roi_align(ramp(8, 8), rois, output_size=(2, 2), sampling_ratio=2)
    expected = torch.tensor([[17.5, 19.5], [37.5, 39.5]], dtype=torch.float64)
    torch.testing.assert_close(got[0, 0], expected)
    # Not aligned: half a pixel further along both axes, 10 * 0.5 + 0.5 more.
    got = core.roi_align(ramp(8, 8), rois, output_size=(2, 2), sampling_ratio=2, aligned=False)
    torch.testing.assert_close(got[0, 0], expected + 5.5)


def test_maximum_of_a_ramp_by_hand() -> None:
    """Samples lie at 0.5 and 1.5 of the bin: the last is (1.5 + 1, 1.5 + 2) - 0.5 -> 10 * 2 + 3."""
    rois = torch.tensor([[0.0, 2, 1, 6, 5]], dtype=torch.float64)
    pooled = core.roi_align_max(ramp(8, 8), rois, output_size=(2, 2), sampling_ratio=2)
    assert (float(pooled.value[0, 0, 0, 0]), float(pooled.y[0, 0, 0, 0]), float(pooled.x[0, 0, 0, 0])) == (
        23,
        2,
        3,
    )


def test_scale_and_small_regions() -> None:
    """A region without extent still covers one pixel when not aligned, and none when aligned and adaptive."""
    rois = torch.tensor([[0.0, 8, 8, 8, 8]], dtype=torch.float64)
    options = {"output_size": (1, 1), "spatial_scale": 0.5}
    got = core.roi_align(ramp(8, 8), rois, aligned=False, **options)
    torch.testing.assert_close(got.flatten(), torch.tensor([49.5], dtype=torch.float64))
    assert core.roi_align(ramp(8, 8), rois, aligned=True, **options).flatten().tolist() == [0.0]


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 999),
    num_rois=st.sampled_from([0, 1, 5]),
    scale=st.sampled_from([1.0, 0.25]),
    sampling_ratio=st.sampled_from([0, 1, 3]),
    output_size=st.sampled_from([(1, 1), (2, 3)]),
    mode=st.sampled_from(["avg", "max"]),
    aligned=st.booleans(),
)
def test_equals_reference_through_mmcv(
    seed: int,
    num_rois: int,
    scale: float,
    sampling_ratio: int,
    output_size: tuple[int, int],
    mode: str,
    aligned: bool,
) -> None:
    from mmcv.ops import roi_align

    maps, rois = random_case(seed, num_rois, scale)
    got = roi_align(maps, rois, output_size, scale, sampling_ratio, mode, aligned)
    expected = reference.roi_align(
        maps.numpy(), rois.numpy(), output_size, scale, sampling_ratio, mode, aligned
    )
    np.testing.assert_allclose(got, expected, atol=1e-10)


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_gradient_through_mmcv(mode: str, sampling_ratio: int, aligned: bool) -> None:
    from mmcv.ops import roi_align

    maps, rois = random_case(7, 4, 0.5)
    maps.requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda x: roi_align(x, rois, (2, 2), 0.5, sampling_ratio, mode, aligned), (maps,), fast_mode=True
    )


@pytest.mark.parametrize("sparse", [True, False])
def test_reading_few_pixels_changes_nothing(sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of reading the map, forced, give the values and gradients of the reference."""
    maps, rois = random_case(3, 5, 1.0)
    monkeypatch.setattr(core, "_is_sparse", lambda *args: sparse)
    got = core.roi_align(maps, rois, output_size=(2, 2), sampling_ratio=0)
    expected = reference.roi_align(maps.numpy(), rois.numpy(), (2, 2), 1.0, 0, "avg", True)
    np.testing.assert_allclose(got, expected, atol=1e-10)
    grad_out = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grad = core.add_roi_align_grad_(torch.ones_like(maps), grad_out, rois) - 1
    torch.testing.assert_close((grad * maps).sum(), (grad_out * got).sum())


def test_large_maps_with_few_regions_are_read_sparsely() -> None:
    maps = torch.randn(1, 64, 200, 200)
    rois = torch.tensor([[0.0, 30, 40, 60, 80]])
    regions = core.measure_regions(
        rois, output_size=(7, 7), spatial_scale=1.0, sampling_ratio=2, aligned=True
    )
    groups = list(core._groups(regions, 49))
    assert core._is_sparse(groups, 49, maps)
    assert not core._is_sparse(groups, 49, maps[:, :, :20, :20].contiguous())
    dense = core.roi_align(
        maps.to(memory_format=torch.channels_last), rois, output_size=(7, 7), sampling_ratio=2
    )
    torch.testing.assert_close(core.roi_align(maps, rois, output_size=(7, 7), sampling_ratio=2), dense)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    maps, rois = random_case(5, 6, 1.0)
    whole = core.roi_align(maps, rois, output_size=(2, 2), sampling_ratio=2)
    monkeypatch.setattr(core, "MAX_ENTRIES", 100)
    assert torch.equal(core.roi_align(maps, rois, output_size=(2, 2), sampling_ratio=2), whole)


def test_infinities_elsewhere_do_not_spread() -> None:
    maps = torch.zeros(1, 1, 8, 8)
    maps[0, 0, 7, 7] = torch.inf
    rois = torch.tensor([[0.0, 0, 0, 3, 3]])
    assert core.roi_align(maps, rois, output_size=(1, 1), sampling_ratio=1).flatten().tolist() == [0.0]


def test_regions_outside_or_turned_inside_out_give_zero() -> None:
    maps = torch.ones(1, 1, 4, 4, requires_grad=True)
    rois = torch.tensor([[0.0, 100, 100, 120, 120], [0.0, 3, 3, 1, 1]])
    got = core.roi_align(maps, rois, output_size=(2, 2), sampling_ratio=0)
    assert torch.equal(got, torch.zeros(2, 1, 2, 2))
    (grad,) = torch.autograd.grad(got.sum(), maps)
    assert torch.equal(grad, torch.zeros_like(maps))


def test_maximum_of_an_empty_region_is_zero_and_has_no_gradient() -> None:
    from mmcv.ops import roi_align

    maps = torch.ones(1, 1, 4, 4, requires_grad=True)
    got = roi_align(maps, torch.tensor([[0.0, 3, 3, 1, 1]]), (2, 2), 1.0, 0, "max", True)
    assert torch.equal(got, torch.zeros(1, 1, 2, 2))
    (grad,) = torch.autograd.grad(got.sum(), maps)
    assert torch.equal(grad, torch.zeros_like(maps))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_half_precision(dtype: torch.dtype, mode: str) -> None:
    """Inputs are rounded alike, so that only the result's rounding differs: half a unit in the last place."""
    from mmcv.ops import roi_align

    maps, rois = random_case(9, 4, 1.0)
    half = maps.to(dtype).requires_grad_(True)
    rois = rois.float()
    got = roi_align(half, rois, (2, 2), 1.0, 2, mode, True)
    full = roi_align(half.detach().float(), rois, (2, 2), 1.0, 2, mode, True)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), full, rtol=torch.finfo(dtype).eps / 2, atol=1e-6)
    (grad,) = torch.autograd.grad(got.sum(), half)
    assert grad.dtype == dtype


def test_deformed_bins_by_hand() -> None:
    """Offset (x, y) = (1, 0), gamma 0.25: the bin of a 4-pixel region moves one pixel in x, + 1 there."""
    rois = torch.tensor([[0.0, 2, 1, 6, 5]], dtype=torch.float64)
    offset = torch.tensor([1.0, 0.0], dtype=torch.float64).view(1, 2, 1, 1)
    options = {"output_size": (1, 1), "sampling_ratio": 2, "gamma": 0.25}
    base = core.deform_roi_pool(ramp(9, 9), rois, None, **options)
    assert float(core.deform_roi_pool(ramp(9, 9), rois, offset, **options) - base) == pytest.approx(1.0)
    down = core.deform_roi_pool(ramp(9, 9), rois, offset.flip(1), **options)
    assert float(down - base) == pytest.approx(10.0)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_deform_roi_pool_through_mmcv(sampling_ratio: int) -> None:
    from mmcv.ops import deform_roi_pool

    maps, rois = random_case(11, 4, 0.5)
    offset = torch.randn(4, 2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = deform_roi_pool(maps, rois, offset, (2, 3), 0.5, sampling_ratio, 0.1)
    expected = reference.roi_align(
        maps.numpy(), rois.numpy(), (2, 3), 0.5, sampling_ratio, "avg", True, offset.numpy(), 0.1
    )
    np.testing.assert_allclose(got, expected, atol=1e-10)
    plain = deform_roi_pool(maps, rois, None, (2, 3), 0.5, sampling_ratio, 0.1)
    np.testing.assert_allclose(plain, core.roi_align(maps, rois, output_size=(2, 3), spatial_scale=0.5,
                                                     sampling_ratio=sampling_ratio), atol=1e-10)  # fmt: skip


def test_deform_roi_pool_gradients() -> None:
    from mmcv.ops import DeformRoIPool

    maps, rois = random_case(13, 3, 0.5)
    offset = torch.randn(3, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pool = DeformRoIPool((2, 2), 0.5, 2, 0.1)
    inputs = (maps.requires_grad_(True), offset.requires_grad_(True))
    assert torch.autograd.gradcheck(lambda x, o: pool(x, rois, o), inputs, fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: pool(x, rois), (maps,), fast_mode=True)
    assert core.deform_roi_pool(maps, rois[:0], None, output_size=(2, 2)).shape == (0, 3, 2, 2)
