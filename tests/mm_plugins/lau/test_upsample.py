"""The layer: found by every host, accepts what they pass, equals the function."""

import pytest
import torch
from mmcv.cnn import build_upsample_layer
from mmengine.registry import init_default_scope
from mmseg.models.utils import UpConvBlock

from mm_plugins.lau import LaUUpsample, location_aware_upsample


@pytest.mark.parametrize("scope", ["mmengine", "mmseg", "mmdet"])
@pytest.mark.parametrize("name", ["LaUUpsample", "location_aware"])
def test_found_under_every_scope(scope: str, name: str) -> None:
    init_default_scope(scope)
    layer = build_upsample_layer({"type": name, "scale_factor": 3}, in_channels=4)
    assert isinstance(layer, LaUUpsample)
    assert layer(torch.zeros(1, 4, 5, 6)).shape == (1, 4, 15, 18)


def test_unet_block_takes_it() -> None:
    """UpConvBlock passes in_channels, out_channels, with_cp, norm_cfg and act_cfg."""
    init_default_scope("mmseg")
    from mmseg.models.backbones.unet import BasicConvBlock

    block = UpConvBlock(
        BasicConvBlock,
        in_channels=8,
        skip_channels=4,
        out_channels=4,
        upsample_cfg={"type": "LaUUpsample", "scale_factor": 2, "mid_channels": 4},
        norm_cfg={"type": "BN"},
        act_cfg={"type": "ReLU"},
    )
    assert block(torch.zeros(2, 4, 8, 8), torch.zeros(2, 8, 4, 4)).shape == (2, 4, 8, 8)
    names = {name for name, _ in block.upsample.named_parameters()}
    assert {"project.conv.weight", "project.bn.weight"} <= names


def test_equals_the_function_with_its_own_offsets() -> None:
    torch.manual_seed(0)
    layer = LaUUpsample(6, (2, 3), num_groups=3, init="xavier", mid_channels=4, max_offset=0.8)
    x, guide = torch.randn(2, 3, 4, 5), torch.randn(2, 6, 4, 5)
    offset = layer.offsets(guide)
    assert offset.abs().max() <= 0.8
    wanted = location_aware_upsample(x, offset, scale_factor=(2, 3), base_grid="half_pixel")
    assert torch.equal(layer(x, guide), wanted)
    assert torch.equal(layer(x, guide, size=(7, 11)), wanted[..., :7, :11])


def test_options_reach_the_operator() -> None:
    x = torch.randn(1, 4, 3, 3)
    for grid in ("asymmetric", "align_corners"):
        layer = LaUUpsample(
            4, 2, base_grid=grid, branch="zero", backend="grid_sample", border_gradient="inward"
        )
        zero = torch.zeros(1, 2, 6, 6)
        torch.testing.assert_close(layer(x), location_aware_upsample(x, zero, scale_factor=2, base_grid=grid))
    with pytest.raises(ValueError, match="border_gradient must be one of"):
        LaUUpsample(4, 2, border_gradient="x")(x)


def test_dysample_starts_as_half_pixel_interpolation() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 8, 5, 5)
    out = LaUUpsample(8, 2, branch="dysample", num_groups=4)(x)
    plain = torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    assert 0 < (out - plain).abs().max() < 0.02


def test_checkpointing_gives_the_same_gradients() -> None:
    results = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        layer = LaUUpsample(4, 2, with_cp=with_cp, mid_channels=4, init="xavier").train()
        x = torch.randn(1, 4, 5, 5, requires_grad=True)
        layer(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_channels_is_another_name_of_in_channels() -> None:
    assert LaUUpsample(channels=4).branch.vertical[0].in_channels == 4
    for wrong in ({}, {"in_channels": 4, "channels": 4}):
        with pytest.raises(ValueError, match="give in_channels, or its other name channels, once"):
            LaUUpsample(**wrong)
    with pytest.raises(ValueError, match="branch must be one of lau, dysample, zero; got 'x'"):
        LaUUpsample(4, branch="x")
