"""What a detector's config says of itself."""

import pytest

from mm_plugins.pkd.model_config import input_format, is_two_stage, level_channels, num_levels
from mm_plugins.pkd.preprocess import InputFormat


def test_two_stages_are_told_by_the_roi_head() -> None:
    assert is_two_stage({"backbone": {}, "roi_head": {"type": "StandardRoIHead"}})
    assert not is_two_stage({"backbone": {}, "bbox_head": {}})


@pytest.mark.parametrize(
    ("neck", "channels", "levels"),
    [
        ({"type": "FPN", "out_channels": 256, "num_outs": 5}, 256, 5),
        ({"type": "SSDNeck", "out_channels": [512, 1024]}, (512, 1024), None),
        ([{"type": "FPN", "out_channels": 256}, {"type": "BFP"}], 256, None),
        ([{"type": "FPN", "out_channels": 256}, {"type": "DyHead", "out_channels": 128}], 128, None),
        ({"type": "Own"}, None, None),
        (None, None, None),
    ],
)
def test_channels_and_levels_of_the_neck(
    neck: object, channels: int | tuple[int, ...] | None, levels: int | None
) -> None:
    """The last part of a chain of necks that states its channels decides."""
    assert level_channels({"neck": neck}) == channels
    assert num_levels({"neck": neck}) == levels


def test_input_format() -> None:
    cfg = {"mean": [1, 2, 3], "std": [4, 5, 6], "rgb_to_bgr": True, "pad_size_divisor": 32, "pad_value": 7}
    wanted = InputFormat(mean=(1, 2, 3), std=(4, 5, 6), swap_channels=True, pad_value=7, pad_size_divisor=32)
    assert input_format({"data_preprocessor": cfg}) == wanted
    assert (
        input_format({}) == input_format({"data_preprocessor": {"mean": None, "std": None}}) == InputFormat()
    )
