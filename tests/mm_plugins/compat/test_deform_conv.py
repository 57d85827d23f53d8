"""Deformable convolution, both versions."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mm_plugins  # noqa: F401
from mm_plugins.compat.portable import deform_conv as core
from tests.mm_plugins.compat import reference


class Case(NamedTuple):
    maps: Tensor
    offset: Tensor
    mask: Tensor
    weight: Tensor
    bias: Tensor
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


def random_case(
    seed: int,
    groups: int = 1,
    deform_groups: int = 1,
    kernel: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    num_images: int = 2,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    maps, weight = normal(num_images, 4, 5, 6), normal(6, 4 // groups, *kernel)
    plain = F.conv2d(maps[:, : 4 // groups], weight, None, stride, padding, dilation)
    taps = deform_groups * kernel[0] * kernel[1]
    offset, mask = normal(num_images, 2 * taps, *plain.shape[2:]), normal(num_images, taps, *plain.shape[2:])
    return Case(maps, offset * 2, mask, weight, normal(6), stride, padding, dilation)


def test_without_displacement_it_is_a_convolution() -> None:
    case = random_case(0, stride=(2, 1), padding=(1, 2), dilation=(1, 2))
    got = core.deform_conv2d(
        case.maps,
        torch.zeros_like(case.offset),
        None,
        case.weight,
        case.bias,
        stride=(2, 1),
        padding=(1, 2),
        dilation=(1, 2),
    )
    expected = F.conv2d(case.maps, case.weight, case.bias, (2, 1), (1, 2), (1, 2))
    torch.testing.assert_close(got, expected)


def test_displacement_order_is_row_then_column_by_hand() -> None:
    """A 1 x 1 kernel of weight 2 displaced by (dy, dx) = (1, 0.5) reads 10 * 1 + 0.5 of the ramp; mask 3."""
    y, x = torch.meshgrid(torch.arange(3.0), torch.arange(3.0), indexing="ij")
    maps = (10 * y + x)[None, None]
    offset = torch.tensor([1.0, 0.5]).view(1, 2, 1, 1).expand(1, 2, 3, 3)
    mask = torch.full((1, 1, 3, 3), 3.0)
    got = core.deform_conv2d(maps, offset, mask, torch.full((1, 1, 1, 1), 2.0))
    assert float(got[0, 0, 0, 0]) == 63.0
    # The last row reads rows beyond the map: zero.
    assert got[0, 0, 2].tolist() == [0.0, 0.0, 0.0]


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 999),
    groups=st.sampled_from([1, 2]),
    deform_groups=st.sampled_from([1, 2, 4]),
    kernel=st.sampled_from([(1, 1), (3, 3), (2, 3)]),
    stride=st.sampled_from([(1, 1), (2, 1)]),
    padding=st.sampled_from([(1, 1), (0, 2)]),
    dilation=st.sampled_from([(1, 1), (2, 1)]),
    max_elements=st.sampled_from([1, 1 << 26]),
)
def test_equals_reference_through_mmcv(
    seed: int,
    groups: int,
    deform_groups: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    max_elements: int,
) -> None:
    """Both versions; one element at a time means one image at a time."""
    from mmcv.ops import deform_conv2d, modulated_deform_conv2d

    case = random_case(seed, groups, deform_groups, kernel, stride, padding, dilation)
    maps, offset, mask, weight, bias = (v.numpy() for v in case[:5])
    layout = (stride, padding, dilation, groups, deform_groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "MAX_COLUMN_ELEMENTS", max_elements)
        first = deform_conv2d(case.maps, case.offset, case.weight, *layout)
        second = modulated_deform_conv2d(*case[:5], *layout)
    np.testing.assert_allclose(
        first, reference.deform_conv(maps, offset, None, weight, None, *layout), atol=1e-10
    )
    np.testing.assert_allclose(
        second, reference.deform_conv(maps, offset, mask, weight, bias, *layout), atol=1e-10
    )


@pytest.mark.parametrize(("groups", "deform_groups"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("max_elements", [1, 1 << 26])
def test_gradients_through_mmcv(
    groups: int, deform_groups: int, max_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmcv.ops import deform_conv2d, modulated_deform_conv2d

    monkeypatch.setattr(core, "MAX_COLUMN_ELEMENTS", max_elements)
    case = random_case(4, groups, deform_groups, kernel=(2, 2), stride=(2, 2), padding=(1, 0))
    maps, offset, mask, weight, bias = (v.requires_grad_(True) for v in case[:5])
    layout = ((2, 2), (1, 0), (1, 1), groups, deform_groups)
    assert torch.autograd.gradcheck(
        lambda x, o, w: deform_conv2d(x, o, w, *layout), (maps, offset, weight), fast_mode=True
    )
    assert torch.autograd.gradcheck(
        lambda x, o, m, w, b: modulated_deform_conv2d(x, o, m, w, b, *layout),
        (maps, offset, mask, weight, bias),
        fast_mode=True,
    )


def test_layers_of_mmcv_train() -> None:
    """DCN and DCNv2 as the zoo builds them: displacements start at 0, DCNv2 masks at sigmoid(0) = 1/2."""
    from mmcv.ops import DeformConv2dPack, ModulatedDeformConv2dPack

    x = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    first = DeformConv2dPack(4, 5, 3, padding=1)
    torch.testing.assert_close(first(x), F.conv2d(x, first.weight, padding=1), atol=1e-5, rtol=1e-5)
    second = ModulatedDeformConv2dPack(4, 5, 3, padding=1, bias=False)
    torch.testing.assert_close(second(x), F.conv2d(x, second.weight, padding=1) / 2, atol=1e-5, rtol=1e-5)
    second(x).sum().backward()
    assert float(second.conv_offset.weight.grad.abs().sum()) > 0
    assert float(second.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Sampling and sums are fp32, so that only the final rounding differs from fp32 on the same inputs."""
    case = random_case(2)
    half = [v.to(dtype) for v in case[:5]]
    got = core.deform_conv2d(*half, padding=(1, 1))
    assert got.dtype == dtype
    full = core.deform_conv2d(*(v.float() for v in half), padding=(1, 1))
    torch.testing.assert_close(got.float(), full, rtol=torch.finfo(dtype).eps / 2, atol=1e-6)


def test_autocast_does_not_change_the_sums() -> None:
    from mmcv.ops import modulated_deform_conv2d

    case = random_case(2)
    inputs = [v.float() for v in case[:5]]
    plain = modulated_deform_conv2d(*inputs, 1, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(modulated_deform_conv2d(*inputs, 1, 1), plain)


def test_wrong_channels_and_sizes_say_how_to_mend_it() -> None:
    case = random_case(0)
    with pytest.raises(ValueError, match="Change in_channels, groups or deform_groups"):
        core.deform_conv2d(case.maps[:, :3], case.offset, None, case.weight, padding=(1, 1))
    with pytest.raises(ValueError, match="deform_groups=3 must divide them"):
        core.deform_conv2d(case.maps, case.offset, None, case.weight, padding=(1, 1), deform_groups=3)
    with pytest.raises(ValueError, match="Compute it with the kernel size, stride, padding and dilation"):
        core.deform_conv2d(case.maps, case.offset, None, case.weight, padding=(0, 0))


def test_no_images() -> None:
    case = random_case(0)
    got = core.deform_conv2d(case.maps[:0], case.offset[:0], case.mask[:0], case.weight, padding=(1, 1))
    assert got.shape == (0, 6, 5, 6)


def test_larger_offset_is_read_as_flat_memory_by_hand() -> None:
    """Two values of 2 x 2, output 1 x 2: the first 2 * 1 * 2 = 4 entries of 0..7, so 0 1 and 2 3."""
    values = torch.arange(8.0).view(1, 2, 2, 2)
    assert core.leading_entries(values, (1, 2)).tolist() == [[[[0.0, 1.0]], [[2.0, 3.0]]]]
    assert core.leading_entries(values, (2, 2)) is values
    assert core.leading_entries(values, (3, 3)) is values


@pytest.mark.parity
def test_offsets_of_a_finer_level_as_dyhead_passes_them() -> None:
    """Sums of magnitudes recorded from compiled mmcv 2.1.0 (CPU, torch 2.13) on the same seeded tensors."""
    from mmcv.ops import modulated_deform_conv2d

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator).requires_grad_()
    offset = torch.randn(2, 18, 16, 16, generator=generator).requires_grad_()
    mask = torch.rand(2, 9, 16, 16, generator=generator).requires_grad_()
    weight = torch.randn(3, 4, 3, 3, generator=generator).requires_grad_()
    out = modulated_deform_conv2d(x, offset, mask, weight, None, 1, 1, 1, 1, 1)
    (out * torch.arange(out.numel()).view_as(out).sin()).sum().backward()
    sums = [t.double().abs().sum().item() for t in (out, x.grad, offset.grad, mask.grad, weight.grad)]
    assert sums == pytest.approx([505.8527, 436.2647, 1846.8239, 1043.3244, 185.4396], abs=2e-3)
