"""Checks of panoptic JSON and PNG: each fault is named, with the way to mend it."""

import copy
from typing import Any

import numpy as np
import pytest

from mm_plugins.spatialflow.annotations import (
    check_annotations,
    check_picture,
    check_things_first,
    match_names,
    mend_segments,
)

IDS = np.array([[1, 1, 2], [0, 2, 2]])
SEGMENTS: list[dict[str, Any]] = [
    {"id": 1, "category_id": 7, "area": 2, "bbox": [0, 0, 2, 1], "iscrowd": 0},
    {"id": 2, "category_id": 9, "area": 3, "bbox": [1, 0, 2, 2], "iscrowd": 0},
]
CONTENT: dict[str, Any] = {
    "images": [{"id": 4, "file_name": "4.jpg", "height": 2, "width": 3}],
    "annotations": [{"image_id": 4, "file_name": "4.png", "segments_info": SEGMENTS}],
    "categories": [
        {"id": 9, "name": "sky", "isthing": 0},
        {"id": 7, "name": "cat", "isthing": 1},
    ],
}


def test_sound_annotations_pass() -> None:
    check_annotations(CONTENT, "a.json")
    check_picture(IDS, SEGMENTS, "image 4")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("categories",), None, "has no \\['categories'\\]; a COCO panoptic JSON needs"),
        (("categories", 0, "isthing"), None, "lacks .*isthing.*. Each needs id, name, and isthing"),
        (("annotations", 0, "segments_info"), None, "This may be an instance JSON"),
        (("annotations", 0, "segments_info", 0, "id"), 2, "Number the segments of an image from 1"),
        (("annotations", 0, "segments_info", 0, "id"), 0, "which is void; got \\[0, 2\\]"),
        (("annotations", 0, "segments_info", 0, "category_id"), 8, "Add it there, or correct the segment"),
        (
            ("annotations", 0, "segments_info", 1, "bbox"),
            None,
            "segment 2 has no bbox.*in the JSON;.*mmhf spatialflow mend",
        ),
        (("annotations", 0, "segments_info", 1, "area"), None, "segment 2 has no area"),
    ],
)
def test_faulty_json(path: tuple, value: Any, message: str) -> None:
    content = copy.deepcopy(CONTENT)
    place: Any = content
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        check_annotations(content, "a.json")


def test_json_and_png_that_disagree() -> None:
    with pytest.raises(
        ValueError, match="the PNG has segments \\[2\\] that the JSON does not list. Add their"
    ):
        check_picture(IDS, SEGMENTS[:1], "image 4")
    extra = [*SEGMENTS, {"id": 3, "category_id": 7, "area": 1, "bbox": [0, 0, 1, 1]}]
    with pytest.raises(
        ValueError, match="the JSON lists segments .*3.*that the PNG does not have; `mmhf spatialflow mend"
    ):
        check_picture(IDS, extra, "image 4")
    wrong = [SEGMENTS[0], {**SEGMENTS[1], "area": 4}]
    with pytest.raises(
        ValueError, match="has area 4.*in the JSON and 3.*pixels in the PNG. Was the PNG resized"
    ):
        check_picture(IDS, wrong, "image 4")


def test_mending_by_hand() -> None:
    """Boxes and areas from the pixels; a segment without a pixel goes; iscrowd is filled in."""
    bare = [{"id": 2, "category_id": 9}, {"id": 1, "category_id": 7, "area": 77}, {"id": 5, "category_id": 7}]
    mended = mend_segments(IDS, bare, "image 4")
    assert mended == [SEGMENTS[1], SEGMENTS[0]]
    assert bare[0] == {"id": 2, "category_id": 9}
    with pytest.raises(ValueError, match="Add their category, or paint them 0"):
        mend_segments(IDS, bare[:1], "image 4")


def test_things_first() -> None:
    assert check_things_first(["a", "b", "c"], [True, True, False], "classes") == 2
    assert check_things_first(["a"], [True], "classes") == 1
    assert check_things_first(["a", "b"], [False, False], "classes") == 0
    with pytest.raises(
        ValueError,
        match="'road' \\(stuff\\) comes before 'car' \\(thing\\).*classes=\\('car', 'road', 'sky'\\)",
    ):
        check_things_first(["road", "car", "sky"], [False, True, False], "classes")


def test_names_give_ids_in_their_own_order() -> None:
    assert match_names(["cat", "sky"], CONTENT["categories"], "a.json") == [7, 9]
    with pytest.raises(ValueError, match="has no category named .*skys.*Did you mean sky"):
        match_names(["skys"], CONTENT["categories"], "a.json")
    with pytest.raises(ValueError, match="It has sky, cat"):
        match_names(["zzzzzz"], CONTENT["categories"], "a.json")
