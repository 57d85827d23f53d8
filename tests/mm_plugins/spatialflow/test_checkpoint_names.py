"""Names and channels of the release's weights."""

import pytest
import torch

from mm_plugins.spatialflow.checkpoint_names import convert_release, things_last


def test_channels_by_hand() -> None:
    """Channels 0-3 with things at 1: stuff 0, 2, 3 keep their order and things come last."""
    assert things_last(torch.tensor([10, 11, 12, 13]), 1).tolist() == [10, 12, 13, 11]
    moved = things_last(torch.arange(54))
    # p(k) = k below 36, p(36) = 53, p(k) = k - 1 above.
    assert moved[:36].tolist() == list(range(36))
    assert moved[53] == 36
    assert moved[36:53].tolist() == list(range(37, 54))


def release(channels: int = 54) -> dict[str, torch.Tensor]:
    return {
        "backbone.conv1.weight": torch.zeros(1),
        "neck.fpn_convs.0.conv.weight": torch.zeros(1),
        "bbox_head.cls_convs.0.conv.weight": torch.zeros(1),
        "mask_head.conv_logits.weight": torch.zeros(1),
        "stuff_head.lateral_convs.0.0.conv.weight": torch.zeros(1),
        "stuff_head.conv.weight": torch.arange(float(channels)).view(-1, 1, 1, 1),
        "stuff_head.conv.bias": torch.arange(float(channels)),
    }


def test_names() -> None:
    converted = convert_release(release())
    assert set(converted) == {
        "backbone.conv1.weight",
        "neck.fpn_convs.0.conv.weight",
        "bbox_head.cls_convs.0.conv.weight",
        "roi_head.mask_head.conv_logits.weight",
        "semantic_head.lateral_convs.0.0.conv.weight",
        "semantic_head.conv.weight",
        "semantic_head.conv.bias",
    }
    for name in ("semantic_head.conv.weight", "semantic_head.conv.bias"):
        assert converted[name].flatten()[-1] == 36


def test_other_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="one of this suite needs no conversion"):
        convert_release(convert_release(release()))
    with pytest.raises(ValueError, match="things_channel=36 is none of the 20 channels"):
        convert_release(release(20))
