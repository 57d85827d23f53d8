"""Data sets: real labels as known, any order of categories, Cityscapes' layout, faults named early."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from mmdet.registry import DATASETS

from tests.mm_plugins.spatialflow import tiny

pytestmark = pytest.mark.host


@pytest.mark.real
@pytest.mark.parametrize("kind", ["PanopticDataset", "CocoPanopticDataset"])
def test_the_real_pair_has_the_known_objects_and_pixels(kind: str) -> None:
    """Stuff counted as index in the stuff list, things as 53; mmdet's own class reads the same."""
    dataset = tiny.coco_sample(kind=kind)
    expected = {
        142238: ((427, 640), 14, {0, 32}, {36: 130762, 39: 8204, 45: 75100, 53: 56502, 255: 2712}),
        439180: (
            (360, 640),
            26,
            {0, 7, 17},
            {10: 11074, 36: 91045, 39: 12912, 45: 40197, 53: 67983, 255: 7189},
        ),
    }
    assert len(dataset) == 2
    for item in dataset:
        sample = item["data_samples"]
        shape, num, labels, pixels = expected[sample.img_id]
        assert sample.ori_shape == shape
        assert len(sample.gt_instances) == num
        assert set(sample.gt_instances.labels.tolist()) == labels
        semantic = sample.gt_sem_seg.sem_seg.numpy().astype(int)
        stuff = np.where(semantic == 255, 255, np.where(semantic < 80, 53, semantic - 80))
        values, counts = np.unique(stuff, return_counts=True)
        assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == pixels


@pytest.mark.real
def test_published_scale_of_the_real_pair() -> None:
    shapes = {
        item["data_samples"].img_id: item["data_samples"].img_shape for item in tiny.coco_sample((1333, 800))
    }
    assert shapes == {142238: (800, 1199), 439180: (750, 1333)}


@pytest.mark.real
def test_nuclei_of_the_repository() -> None:
    dataset = tiny.nuclei_dataset()
    assert len(dataset) == 16
    assert dataset.metainfo["labels_follow_classes"]
    sizes = [len(dataset.get_data_info(i)["instances"]) for i in range(16)]
    assert sum(sizes) == 671 - 16  # All segments but one background an image.


def write_set(
    folder: Path,
    categories: list[dict],
    *,
    png: str = "one.png",
    ids: np.ndarray | None = None,
    **segment: Any,
) -> dict:
    """A set of one image with a square of category 5 on category 2; arguments of the data set."""
    if ids is None:
        ids = np.ones((8, 8), np.int64)
        ids[2:6, 2:6] = 300
    (folder / "png").mkdir(parents=True)
    rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    cv2.imwrite(str(folder / "png" / png), rgb[..., ::-1])
    cv2.imwrite(str(folder / "one.jpg"), np.zeros((*ids.shape, 3), np.uint8))
    segments = [
        {"id": 300, "category_id": 5, "area": 16, "bbox": [2, 2, 4, 4], "iscrowd": 0} | segment,
        {"id": 1, "category_id": 2, "area": int((ids == 1).sum()), "bbox": [0, 0, 8, 8], "iscrowd": 0},
    ]
    content = {
        "images": [{"id": 1, "file_name": "one.jpg", "height": ids.shape[0], "width": ids.shape[1]}],
        "annotations": [{"image_id": 1, "file_name": png, "segments_info": segments}],
        "categories": categories,
    }
    (folder / "set.json").write_text(json.dumps(content))
    return dict(
        type="PanopticDataset",
        ann_file=str(folder / "set.json"),
        data_prefix=dict(img=str(folder), seg=str(folder / "png")),
        metainfo=dict(classes=("cat", "sky"), thing_classes=("cat",), stuff_classes=("sky",)),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadPanopticAnnotations"),
            dict(type="PackDetInputs"),
        ],
    )


STUFF_FIRST = [{"id": 2, "name": "sky", "isthing": 0}, {"id": 5, "name": "cat", "isthing": 1}]


def test_labels_go_by_name_whatever_the_order_of_the_json(tmp_path: Path) -> None:
    """A JSON with stuff first: mmdet's class would call the sky 0, a thing; the PNG has a name of its own."""
    config = write_set(tmp_path, STUFF_FIRST, png="other_name.png")
    sample = DATASETS.build(config)[0]["data_samples"]
    assert sample.gt_instances.labels.tolist() == [0]
    assert sample.gt_instances.bboxes.tensor.tolist() == [[2, 2, 6, 6]]
    semantic = sample.gt_sem_seg.sem_seg[0]
    assert (semantic == 0).sum() == 16
    assert (semantic == 1).sum() == 48


def test_crowd_objects_are_no_targets(tmp_path: Path) -> None:
    config = write_set(tmp_path, STUFF_FIRST, iscrowd=1)
    sample = DATASETS.build(config)[0]["data_samples"]
    assert len(sample.gt_instances) == 0
    assert (sample.gt_sem_seg.sem_seg[0] == 0).sum() == 16


def test_a_missing_crowd_flag_means_none(tmp_path: Path) -> None:
    config = write_set(tmp_path, STUFF_FIRST)
    content = json.loads((tmp_path / "set.json").read_text())
    for segment in content["annotations"][0]["segments_info"]:
        del segment["iscrowd"]
    (tmp_path / "set.json").write_text(json.dumps(content))
    assert len(DATASETS.build(config)[0]["data_samples"].gt_instances) == 1


def test_classes_that_are_left_out_are_void(tmp_path: Path) -> None:
    config = write_set(tmp_path, [*STUFF_FIRST, {"id": 8, "name": "dog", "isthing": 1}])
    config["metainfo"] = dict(classes=("cat",), thing_classes=("cat",), stuff_classes=())
    sample = DATASETS.build(config)[0]["data_samples"]
    assert (sample.gt_sem_seg.sem_seg[0] == 255).sum() == 48


def test_faults_are_named_when_the_set_is_built(tmp_path: Path) -> None:
    config = write_set(tmp_path / "a", STUFF_FIRST)
    config["metainfo"] = dict(classes=("sky", "cat"), thing_classes=("cat",), stuff_classes=("sky",))
    with pytest.raises(ValueError, match="things must come before stuff.*classes=\\('cat', 'sky'\\)"):
        DATASETS.build(config)
    config["metainfo"] = dict(classes=("cats", "sky"))
    with pytest.raises(ValueError, match="no category named 'cats'. Did you mean cat"):
        DATASETS.build(config)
    config = write_set(tmp_path / "b", STUFF_FIRST, category_id=77)
    with pytest.raises(ValueError, match="category_id 77, which categories does not list"):
        DATASETS.build(config)


def test_cityscapes_layout(tmp_path: Path) -> None:
    """String ids, stuff before things, PNG and image named differently, images in a folder of their city."""
    names = DATASETS.get("CityscapesPanopticDataset").METAINFO["classes"]
    assert len(names) == 19
    ids = {name: i for i, name in enumerate(names)}
    categories = [
        {"id": 100 + ids[n], "name": n, "isthing": int(ids[n] < 8)} for n in (*names[8:], *names[:8])
    ]
    image_id = "aachen_000000_000019"
    png = f"{image_id}_gtFine_panoptic.png"
    config = write_set(tmp_path, categories, png=png, category_id=102)
    content = json.loads((tmp_path / "set.json").read_text())
    content["images"][0] |= {"id": image_id, "file_name": f"{image_id}_gtFine_leftImg8bit.png"}
    content["annotations"][0]["image_id"] = image_id
    content["annotations"][0]["segments_info"][1]["category_id"] = 118
    (tmp_path / "set.json").write_text(json.dumps(content))
    (tmp_path / "aachen").mkdir()
    cv2.imwrite(str(tmp_path / "aachen" / f"{image_id}_leftImg8bit.png"), np.zeros((8, 8, 3), np.uint8))
    del config["metainfo"]
    sample = DATASETS.build(config | {"type": "CityscapesPanopticDataset"})[0]["data_samples"]
    assert sample.gt_instances.labels.tolist() == [2]
    assert (sample.gt_sem_seg.sem_seg[0] == 18).sum() == 48
