"""Multi-scale deformable attention."""

import numpy as np
import pytest
import torch
from torch import Tensor

import mm_plugins  # noqa: F401
from mm_plugins.compat.portable import ext_signatures
from mm_plugins.compat.portable.deform_attn import ms_deform_attn
from tests.mm_plugins.compat import reference

SHAPES = [(3, 4), (2, 2)]


def random_case(seed: int, num_queries: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Value, shapes, starts, locations (some outside [0, 1]) and weights; 2 images, 3 heads of 2 channels."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(2, 16, 3, 2, generator=generator, dtype=torch.float64)
    locations = torch.rand(2, num_queries, 3, 2, 2, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.3
    weights = torch.rand(2, num_queries, 3, 2, 2, generator=generator, dtype=torch.float64)
    return value, torch.tensor(SHAPES), torch.tensor([0, 12]), locations, weights


def test_centre_of_a_pixel_by_hand() -> None:
    """Pixel (row 1, column 0) of a 2 x 2 level has its centre at x = 0.25, y = 0.75; weight 3."""
    value = torch.tensor([1.0, 2.0, 5.0, 7.0]).view(1, 4, 1, 1)
    location = torch.tensor([0.25, 0.75]).view(1, 1, 1, 1, 1, 2)
    weight = torch.full((1, 1, 1, 1, 1), 3.0)
    got = ms_deform_attn(value, torch.tensor([[2, 2]]), torch.tensor([0]), location, weight)
    assert got.flatten().tolist() == [15.0]


def test_equals_reference_and_mmcv_s_own_formula() -> None:
    """mmcv's CPU formula goes through grid_sample, which shares nothing with this one."""
    from mmcv.ops.multi_scale_deform_attn import (
        MultiScaleDeformableAttnFunction,
        multi_scale_deformable_attn_pytorch,
    )

    value, shapes, starts, locations, weights = random_case(0)
    got = MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64)
    expected = reference.ms_deform_attn(value.numpy(), SHAPES, locations.numpy(), weights.numpy())
    np.testing.assert_allclose(got, expected, atol=1e-12)
    torch.testing.assert_close(got, multi_scale_deformable_attn_pytorch(value, shapes, locations, weights))


@pytest.mark.parametrize("max_entries", [1, 1 << 22])
def test_gradients_through_mmcv(max_entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One entry at a time means one query at a time."""
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    monkeypatch.setattr(ext_signatures, "MAX_ATTENTION_ENTRIES", max_entries)
    value, shapes, starts, locations, weights = random_case(1, 3)
    inputs = tuple(v.requires_grad_(True) for v in (value, locations, weights))

    def attend(v: Tensor, points: Tensor, w: Tensor) -> Tensor:
        return MultiScaleDeformableAttnFunction.apply(v, shapes, starts, points, w, 64)

    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)


def test_half_precision_and_no_queries() -> None:
    value, shapes, starts, locations, weights = random_case(2)
    got = ms_deform_attn(value.half(), shapes, starts, locations, weights)
    assert got.dtype == torch.float16
    full = ms_deform_attn(value.half().float(), shapes, starts, locations, weights)
    torch.testing.assert_close(got.float(), full, rtol=2**-11, atol=1e-6)
    none = ms_deform_attn(value, shapes, starts, locations[:, :0], weights[:, :0])
    assert none.shape == (2, 0, 6)
