"""Heads: parameters, flows against RetinaHead, gradients, deformable steps, stuff and mask losses,
options."""

import math
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData, PixelData
from torch import nn

from mm_plugins.spatialflow.head import (
    SpatialFlowFusionHead,
    SpatialFlowMaskHead,
    SpatialFlowStuffHead,
    SteeredConv,
)
from tests.mm_plugins.spatialflow import tiny


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.host
def test_published_numbers_of_parameters() -> None:
    """R50, 80 + 53 classes; counts of the release."""
    model = MODELS.build(tiny.model_config("spatialflow_r50_fpn_20e_coco"))
    parts = (model.backbone, model.neck, model.bbox_head, model.roi_head, model.semantic_head)
    assert [count(part) for part in parts] == [23_508_032, 7_997_440, 15_314_420, 2_643_280, 1_335_606]
    assert count(model) == 50_798_778


@pytest.mark.host
def test_parameters_of_the_deformable_heads_and_of_retinanet() -> None:
    retina: dict[str, Any] = dict(num_classes=80, channels=256)
    steps = dict(dcn_cls_convs_idx=[0, 1, 2, 3], dcn_stuff_convs_idx=[0, 1, 2, 3], dcn_mask_convs_idx=[0])
    head = MODELS.build(tiny.head_config(**retina, **steps))
    assert count(head) == 10_563_815
    assert head.cls_spatial_flow_convs[0].conv.out_channels == 27
    plain = MODELS.build(tiny.head_config(**retina, type="RetinaHead"))
    assert count(plain) == 6_463_220


def test_names_are_those_of_the_release() -> None:
    names = {name.split(".")[0] for name in tiny.head().state_dict()}
    assert names == {
        "cls_convs",
        "reg_convs",
        "mask_convs",
        "stuff_convs",
        "cls_spatial_flow_convs",
        "mask_spatial_flow_convs",
        "stuff_spatial_flow_convs",
        "stuff_mask_flow_convs",
        "retina_cls",
        "retina_reg",
    }
    assert {"cls_convs.3.conv.weight", "mask_spatial_flow_convs.0.conv.bias"} <= set(tiny.head().state_dict())


def silence(head: nn.Module) -> nn.Module:
    """All flows multiply by zero."""
    for name, parameter in head.named_parameters():
        if "flow" in name:
            nn.init.zeros_(parameter)
    return head


def test_silent_flows_equal_retinanet_bit_for_bit() -> None:
    head, x = silence(tiny.head()), tiny.pyramid()
    retina = MODELS.build(tiny.head_config(type="RetinaHead"))
    retina.load_state_dict(head.state_dict(), strict=False)
    cls, reg, stuff, mask = head(x)
    expected_cls, expected_reg = retina(x)
    assert [len(out) for out in (cls, reg, stuff, mask)] == [5, 5, 3, 3]
    assert all(torch.equal(a, b) for a, b in zip(cls + reg, expected_cls + expected_reg, strict=True))
    for level, feature in enumerate(x[:3]):
        plain = feature
        for conv in head.stuff_convs:
            plain = conv(plain)
        assert torch.equal(stuff[level], plain)
        assert torch.equal(mask[level], head.mask_convs[0](feature))


def test_flows_are_felt_on_every_level() -> None:
    head, x = tiny.head(), tiny.pyramid()
    loud = head(x)
    silent = silence(head)(x)
    for kind in (0, 2, 3):
        assert all(
            not torch.allclose(a, b, rtol=1e-3, atol=1e-3)
            for a, b in zip(loud[kind], silent[kind], strict=True)
        )
    assert all(torch.equal(a, b) for a, b in zip(loud[1], silent[1], strict=True))


def test_stuff_and_mask_never_reach_classes_and_boxes() -> None:
    head, x = tiny.head(), tiny.pyramid()
    before = head(x)
    for name, parameter in head.named_parameters():
        if name.startswith(("stuff", "mask")):
            nn.init.normal_(parameter, std=1.0)
    after = head(x)
    for kind in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(before[kind], after[kind], strict=True))
    assert not torch.equal(before[2][0], after[2][0])


@pytest.mark.parametrize("silent", [False, True])
def test_gradients_of_stuff_go_where_the_flows_go(silent: bool) -> None:
    """Through the flows to the regression convolutions; never to classification and mask."""
    head = silence(tiny.head()) if silent else tiny.head()
    sum(feature.square().sum() for feature in head(tiny.pyramid())[2]).backward()
    reached = {
        name: sum(float(p.grad.abs().sum()) for p in getattr(head, name).parameters() if p.grad is not None)
        for name in ("reg_convs", "cls_convs", "mask_convs", "stuff_spatial_flow_convs", "stuff_convs")
    }
    assert (reached["reg_convs"] == 0) == silent
    assert reached["cls_convs"] == reached["mask_convs"] == 0
    assert reached["stuff_spatial_flow_convs"] > 0
    assert reached["stuff_convs"] > 0


@pytest.mark.parametrize(
    "flows", [(), ("cls",), ("stuff",), ("mask", "stuff_mask"), ("cls", "stuff", "mask", "stuff_mask")]
)
def test_a_flow_that_is_off_has_no_parameters(flows: tuple[str, ...]) -> None:
    head = tiny.head(flows=flows)
    lists = {
        "cls": "cls_spatial_flow_convs",
        "stuff": "stuff_spatial_flow_convs",
        "mask": "mask_spatial_flow_convs",
        "stuff_mask": "stuff_mask_flow_convs",
    }
    for flow, name in lists.items():
        assert (len(getattr(head, name)) > 0) == (flow in flows)
    # And is the same as one that multiplies by zero.
    whole = silence(tiny.head())
    whole.load_state_dict(head.state_dict(), strict=False)
    for a, b in zip(head(tiny.pyramid()), whole(tiny.pyramid()), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def test_joined_flow_convolutions() -> None:
    x = tiny.pyramid()
    plain, joined = tiny.head(), tiny.head(fuse_flow_convs=True)
    joined.load_state_dict(plain.state_dict())
    for a, b in zip(plain(x), joined(x), strict=True):
        for one, other in zip(a, b, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.host
def test_steered_convolution_without_a_signal_has_half_the_amplitude() -> None:
    """Flow of zeros: offsets 0, modulation sigmoid(0) = 1/2; ReLU(W*c / 2 + b)."""
    torch.manual_seed(0)
    conv, plain = SteeredConv(4, 6), nn.Conv2d(4, 6, 3, padding=1)
    plain.load_state_dict(conv.conv.state_dict())
    nn.init.normal_(plain.bias)
    conv.conv.load_state_dict(plain.state_dict())
    x, offset = torch.randn(2, 4, 7, 5), torch.zeros(2, 18, 7, 5)
    bias = plain.bias[:, None, None]
    half = conv(x, offset, torch.full((2, 9, 7, 5), 0.5))
    torch.testing.assert_close(half, torch.relu((plain(x) - bias) / 2 + bias), rtol=1e-4, atol=1e-5)
    whole = conv(x, offset, torch.ones(2, 9, 7, 5))
    torch.testing.assert_close(whole, torch.relu(plain(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.host
def test_a_deformable_head_runs_and_trains_every_parameter() -> None:
    head = tiny.head(
        dcn_cls_convs_idx=[0, 1, 2, 3],
        dcn_stuff_convs_idx=[1, 3],
        dcn_mask_convs_idx=[0],
        dcn_reg_convs_idx=[3],
    )
    outs = head(tiny.pyramid(side=8))
    sum(feature.square().mean() for kind in outs for feature in kind).backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_weights_start_as_published() -> None:
    """N(0, 0.01), bias 0, prior 0.01 of classes: bias -ln 99."""
    head = MODELS.build(tiny.head_config(channels=64, dcn_cls_convs_idx=[0]))
    head.init_weights()
    torch.testing.assert_close(head.retina_cls.bias, torch.full((27,), -math.log(99)))
    for conv in (head.stuff_convs[0].conv, head.cls_spatial_flow_convs[1].conv, head.cls_convs[0].conv):
        assert 0.0095 < float(conv.weight.detach().std()) < 0.0105
        assert float(conv.bias.abs().max()) == 0
    stuff = stuff_head(feat_channels=64, in_channels=32)
    stuff.init_weights()
    first = stuff.lateral_convs[0][0]
    # Kaiming, fan_out: sqrt(2 / (64 * 9)) = 0.0589.
    assert float(first.conv.weight.detach().std()) == pytest.approx(0.0589, rel=0.05)
    assert float((first.gn.weight - 1).abs().max()) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flows": ("cls", "stuf")}, "has unknown 'stuf'.*; the flows are .*Did you mean 'stuff'"),
        ({"num_classes": 0}, "train a semantic segmentor"),
        ({"stacked_stuff_convs": 3}, "must equal stacked_convs=4"),
        ({"stacked_mask_convs": 5}, "masks go along the last steps"),
        ({"feat_channels": 32}, "set neck.out_channels to the same number"),
        ({"num_flow_levels": 6}, "the levels of the pyramid"),
        ({"dcn_cls_convs_idx": [4]}, "Count from 0"),
        (
            {"flows": ("stuff",), "dcn_cls_convs_idx": [0]},
            "which gives the offsets. Add .*drop dcn_cls_convs_idx",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.head(**changes)
    with pytest.raises(TypeError, match="unexpected keyword"):
        tiny.head(flow=("cls",))


def stuff_head(**changes: Any) -> SpatialFlowStuffHead:
    settings: dict[str, Any] = dict(
        num_things_classes=3,
        num_stuff_classes=4,
        in_channels=8,
        feat_channels=16,
        norm_cfg=dict(type="GN", num_groups=4),
    )
    torch.manual_seed(0)
    return SpatialFlowStuffHead(**(settings | changes))


def labelled(sizes: list[tuple[int, int]], padded: tuple[int, int]) -> list[DetDataSample]:
    """Random labels 0..6 padded with 255; one ignored row."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for height, width in sizes:
        labels = torch.full((1, *padded), 255)
        labels[0, :height, :width] = torch.randint(0, 7, (height, width), generator=generator)
        labels[0, 0] = 255
        sample = DetDataSample(
            metainfo=dict(img_shape=(height, width), ori_shape=(height, width), batch_input_shape=padded)
        )
        sample.gt_sem_seg = PixelData(sem_seg=labels.to(torch.uint8))
        samples.append(sample)
    return samples


FEATURES = [(8, 8), (4, 4), (2, 2)]


def stuff_features(batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(batch, 8, *size, generator=generator) for size in FEATURES]


@pytest.mark.parametrize("weight", [0.25, 0.5])
def test_stuff_loss_of_an_undecided_head_by_hand(weight: float) -> None:
    """Logits 0 over 5 channels: weight * ln 5 * (labelled pixels) / (pixels of the images). Of 48x64 and
    64x40 pixels, one row each is ignored."""
    head = stuff_head(loss_seg=dict(type="CrossEntropyLoss", ignore_index=255, loss_weight=weight))
    nn.init.zeros_(head.conv.weight)
    nn.init.zeros_(head.conv.bias)
    loss = head.loss(stuff_features(), labelled([(48, 64), (64, 40)], (64, 64)))["loss_seg"]
    share = (47 * 64 + 63 * 40) / (48 * 64 + 64 * 40)
    assert float(loss.detach()) == pytest.approx(weight * math.log(5) * share, rel=1e-6)


def test_stuff_loss_does_not_grow_with_the_batch() -> None:
    head, x, samples = stuff_head(), stuff_features(1), labelled([(60, 64)], (64, 64))
    once = head.loss(x, samples)["loss_seg"]
    twice = head.loss([torch.cat([f, f]) for f in x], samples * 2)["loss_seg"]
    torch.testing.assert_close(twice, once)
    head.normalise = "official"
    grown = head.loss([torch.cat([f, f]) for f in x], samples * 2)["loss_seg"]
    torch.testing.assert_close(grown, 2 * head.loss(x, samples)["loss_seg"])


def test_quarter_resolution() -> None:
    """Logits at stride 4, labels every fourth pixel; 12x16 + 16x10 of them, first rows ignored."""
    head = stuff_head(loss_resolution="quarter")
    nn.init.zeros_(head.conv.weight)
    nn.init.zeros_(head.conv.bias)
    samples = labelled([(48, 64), (64, 40)], (64, 64))
    loss = float(head.loss(stuff_features(), samples)["loss_seg"].detach())
    share = (11 * 16 + 15 * 10) / (12 * 16 + 16 * 10)
    assert loss == pytest.approx(0.5 * math.log(5) * share, rel=1e-6)
    logits = head.predict(stuff_features(), [s.metainfo for s in samples], rescale=True)
    assert [tuple(image.shape) for image in logits] == [(5, 48, 64), (5, 64, 40)]


def test_stuff_prediction_has_the_size_of_each_image() -> None:
    head = stuff_head().eval()
    metas = [
        dict(img_shape=(48, 64), ori_shape=(30, 40), batch_input_shape=(64, 64)),
        dict(img_shape=(64, 40), ori_shape=(128, 80), batch_input_shape=(64, 64)),
    ]
    with torch.no_grad():
        sizes = [tuple(i.shape) for i in head.predict(stuff_features(), metas, rescale=True)]
        assert sizes == [(5, 30, 40), (5, 128, 80)]
        sizes = [tuple(i.shape) for i in head.predict(stuff_features(), metas)]
        assert sizes == [(5, 48, 64), (5, 64, 40)]
        # The release: argmax first, then nearest neighbour.
        head.legacy_resize = True
        legacy = head.predict(stuff_features(), metas, rescale=True)[1].argmax(0)
        labels = head.predict(stuff_features(), metas)[1].argmax(0)
    assert torch.equal(legacy, labels.repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_input_that_is_no_multiple_of_32_is_refused() -> None:
    x = [torch.zeros(1, 8, *size) for size in ((9, 8), (5, 4), (3, 2))]
    with pytest.raises(
        ValueError,
        match="network's input is no multiple of .*pixels. Set data_preprocessor.pad_size_divisor=32",
    ):
        stuff_head()(x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_resolution": "half"}, "'full' or 'quarter'; got 'half'"),
        ({"normalise": "mean"}, "'valid' or 'official'; got 'mean'"),
        ({"loss_seg": dict(type="CrossEntropyLoss", ignore_index=0)}, "mmdet's label for void"),
        ({"feat_strides": (8, 16, 24)}, "powers of 2 from 4 on"),
        ({"num_things_classes": 300}, "At most 255 classes"),
    ],
)
def test_stuff_options_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stuff_head(**changes)


def mask_head() -> SpatialFlowMaskHead:
    config = tiny.model_config(**tiny.SMALL_CLASSES)
    return MODELS.build(
        {**config.roi_head, "train_cfg": config.train_cfg.mask, "test_cfg": config.test_cfg.mask}
    )


@pytest.mark.host
def test_masks_learn_on_annotated_and_matching_boxes_only() -> None:
    """Two objects; of three predicted boxes one meets the first object (IoU 24*20 / 24*24 = 5/6)."""
    sample = tiny.synthetic_batch([(64, 64)])["data_samples"][0]
    boxes = InstanceData(bboxes=torch.tensor([[4.0, 4, 28, 24], [40, 0, 60, 10], [0, 40, 20, 60]]))
    (result,) = mask_head().sample([boxes], [sample])
    assert result.pos_priors.tolist() == [[4.0, 4, 28, 28], [30, 20, 60, 52], [4, 4, 28, 24]]
    assert result.pos_assigned_gt_inds.tolist() == [0, 1, 0]
    assert len(result.neg_priors) == 0


@pytest.mark.host
def test_undecided_masks_lose_ln_2() -> None:
    head, samples = mask_head(), tiny.synthetic_batch([(64, 64)])["data_samples"]
    nn.init.zeros_(head.mask_head.conv_logits.weight)
    nn.init.zeros_(head.mask_head.conv_logits.bias)
    features = [torch.randn(1, 64, 64 // s, 64 // s) for s in (8, 16, 32)]
    loss = head.loss(features, [InstanceData(bboxes=torch.zeros(0, 4))], samples)["loss_mask"]
    assert float(loss.detach()) == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.host
def test_masks_learn_on_every_image_of_the_batch() -> None:
    """Two objects an image: the loss of both images is the mean of their losses, which differ."""
    head, samples = mask_head(), tiny.synthetic_batch([(64, 64), (64, 64)])["data_samples"]
    generator = torch.Generator().manual_seed(0)
    features = [3 * torch.randn(2, 64, 64 // s, 64 // s, generator=generator) for s in (8, 16, 32)]
    nothing = InstanceData(bboxes=torch.zeros(0, 4))

    def loss(first: int, last: int) -> float:
        part = [level[first:last] for level in features]
        return float(head.loss(part, [nothing] * (last - first), samples[first:last])["loss_mask"].detach())

    assert abs(loss(0, 1) - loss(1, 2)) > 1e-3
    assert loss(0, 2) == pytest.approx((loss(0, 1) + loss(1, 2)) / 2, rel=1e-5)


def test_fusion_options_are_checked() -> None:
    assert SpatialFlowFusionHead(3, 2).settings["stuff_area_limit"] == 4900
    with pytest.raises(ValueError, match="test_cfg.panoptic has unknown .*overlap.*; it takes score_thr"):
        SpatialFlowFusionHead(3, 2, test_cfg={"overlap": 0.5})
    with pytest.raises(ValueError, match="score_thr.*must lie in \\[0, 1\\]; got .*37"):
        SpatialFlowFusionHead(3, 2, test_cfg={"score_thr": 37})
    assert SpatialFlowFusionHead(3, 2, test_cfg={"box_fill": None}).settings["box_fill"] is None
