"""Repairs of upstream faults: the fault is really there without them, and the numbers are right with them."""

import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import RoIAlign
from mmdet.models.dense_heads import SSDHead
from mmdet.models.roi_heads.mask_heads import fcn_mask_head
from mmseg.models.losses import CrossEntropyLoss
from mmseg.models.losses import cross_entropy_loss as module

import mm_plugins  # noqa: F401
from mm_plugins.compat import upstream
from mm_plugins.compat.upstream import (
    boxes_meet_image,
    repair_roi_align_choice,
    repair_upstream,
    weighted_mean_factor,
)


def test_denominator_by_hand() -> None:
    """Labels 0, 1, 1 count (the 255 does not), so the weights 2, 3 give 2 + 3 + 3 = 8."""
    label = torch.tensor([[0, 1], [1, 255]])
    assert weighted_mean_factor(label, torch.tensor([2.0, 3.0]), 255).item() == 8.0


def test_class_weights_with_ignored_labels_equal_pytorch() -> None:
    generator = torch.Generator().manual_seed(0)
    pred = torch.randn(2, 3, 4, 4, generator=generator)
    label = torch.randint(0, 3, (2, 4, 4), generator=generator)
    label[0, 0] = 255
    weights = [1.0, 2.0, 0.5]
    expected = F.cross_entropy(pred, label, torch.tensor(weights), ignore_index=255)
    got = CrossEntropyLoss(class_weight=weights)(pred, label, ignore_index=255)
    torch.testing.assert_close(got, expected)
    with pytest.raises(IndexError):
        module.cross_entropy.__wrapped__(pred, label, class_weight=torch.tensor(weights), ignore_index=255)


def test_without_class_weights_nothing_changes() -> None:
    pred, label = torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long)
    arguments = {"pred": pred, "label": label, "ignore_index": 255}
    assert torch.equal(module.cross_entropy(**arguments), module.cross_entropy.__wrapped__(**arguments))


def test_ssd_head_answers_what_prediction_asks() -> None:
    assert getattr(SSDHead.loss_cls, "custom_cls_channels", False) is False


def test_roi_align_without_torchvision_runs_and_with_it_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Layer(RoIAlign):
        pass

    repair_roi_align_choice(Layer, torchvision_imports=True)
    assert "__init__" not in vars(Layer)
    repair_roi_align_choice(Layer, torchvision_imports=False)
    told: list[str] = []
    monkeypatch.setattr(upstream, "print_log", lambda text, **_: told.append(text))
    assert Layer(output_size=2).use_torchvision is False
    assert told == []
    layer = Layer(output_size=2, use_torchvision=True)
    assert "mmcv's own op serves" in told[0]
    assert layer.use_torchvision is False
    assert layer(torch.ones(1, 1, 8, 8), torch.tensor([[0.0, 1, 1, 5, 5]])).shape == (1, 1, 2, 2)


def test_repairs_are_applied_once() -> None:
    before = module.cross_entropy
    repair_upstream(torchvision_imports=True)
    assert module.cross_entropy is before


def test_rectangle_and_image_by_hand() -> None:
    """An image of 4 x 6 (rows, columns); a box right of it, one above it, and both, whose hull crosses it."""
    right, above = [7.0, 1.0, 9.0, 3.0], [1.0, -5.0, 3.0, -2.0]
    assert not boxes_meet_image(torch.tensor([right]), 4, 6)
    assert not boxes_meet_image(torch.tensor([above]), 4, 6)
    assert boxes_meet_image(torch.tensor([right, above]), 4, 6)


def test_mask_outside_of_the_image_is_pasted_as_zeros() -> None:
    masks, box = torch.ones(1, 1, 2, 2), torch.tensor([[9.0, 1.0, 11.0, 3.0]])
    pasted, region = fcn_mask_head._do_paste_mask(masks, box, 4, 6, skip_empty=True)
    assert pasted.shape == (1, 4, 6)
    assert region == ()
    assert not pasted.any()
    with pytest.raises(RuntimeError, match="upper bound"):
        fcn_mask_head._do_paste_mask.__wrapped__(masks, box, 4, 6, skip_empty=True)
