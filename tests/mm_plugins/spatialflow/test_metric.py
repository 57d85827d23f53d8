"""The registered metric on real annotations: golden values, other models of mmdet, faults."""

import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmdet.evaluation.metrics import CocoPanopticMetric
from mmdet.models.seg_heads.panoptic_fusion_heads import HeuristicFusionHead
from mmdet.registry import METRICS
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData

from mm_plugins.spatialflow.fusion import fuse
from mm_plugins.spatialflow.metric import PanopticQuality
from tests.mm_plugins.spatialflow import tiny
from tests.mm_plugins.spatialflow.test_dataset import STUFF_FIRST, write_set
from tests.real_data import real_data

pytestmark = pytest.mark.host
META = {"classes": ("cat", "sky"), "thing_classes": ("cat",), "stuff_classes": ("sky",)}


def pair_metric(**changes: Any) -> PanopticQuality:
    """The metric on panopticapi's two COCO images."""
    folder = real_data("panopticapi_sample")
    metric = PanopticQuality(
        str(folder / "panoptic_examples.json"), str(folder / "panoptic_examples"), **changes
    )
    metric.dataset_meta = tiny.coco_sample().metainfo
    return metric


def perfect(area_limit: int | None = None, *, instances: bool = True, **fusion: Any) -> list[dict]:
    """Annotated instances and stuff as predictions, fused by us, or by mmdet where nothing is filled."""
    samples = []
    for item in tiny.coco_sample():
        sample = item["data_samples"]
        found = sample.gt_instances if instances else sample.gt_instances[:0]
        masks = torch.from_numpy(found.masks.masks.astype(bool)).reshape(-1, *sample.ori_shape)
        semantic = sample.gt_sem_seg.sem_seg[0].long()
        stuff = torch.where(semantic < 80, 53, semantic - 80).clamp(max=53)
        boxes = found.bboxes.tensor
        scores = torch.linspace(1.0, 0.9, len(boxes))
        if fusion:
            panoptic = fuse(masks, boxes, scores, found.labels, stuff, num_things=80, num_stuff=53, **fusion)[
                None
            ]
        else:
            head = HeuristicFusionHead(test_cfg=ConfigDict(mask_overlap=0.5, stuff_area_limit=area_limit))
            result = InstanceData(bboxes=boxes, scores=scores, labels=found.labels, masks=masks)
            logits = torch.nn.functional.one_hot(stuff, 54).permute(2, 0, 1)
            panoptic = head.predict([result], [logits])[0].sem_seg
        samples.append(
            {
                "img_id": sample.img_id,
                "img_path": sample.img_path,
                "ori_shape": sample.ori_shape,
                "pred_panoptic_seg": {"sem_seg": panoptic},
            }
        )
    return samples


def scores(metric: PanopticQuality, samples: list[dict]) -> dict[str, float]:
    metric.process({}, samples)
    return metric.evaluate(size=len(samples))


@pytest.mark.real
@pytest.mark.parametrize(
    ("limit", "pq", "pq_st"),
    [(8204, 100.0, 100.0), (8205, 95.8333, 91.6667), (10000, 95.8333, 91.6667), (12000, 83.3333, 66.6667)],
)
@pytest.mark.parametrize("ours", [False, True])
def test_truth_through_fusion(limit: int, pq: float, pq_st: float, ours: bool) -> None:
    """The smallest stuff segment has 8,204 pixels; one that is dropped is a miss: of 6 stuff segments in 4
    classes, one class falls from 1 to 2/3 at 8,205."""
    options = dict(stuff_area_limit=limit, mask_overlap=0.5, box_fill=None) if ours else {}
    found = scores(pair_metric(), perfect(limit, **options))
    assert found["coco_panoptic/PQ"] == pytest.approx(pq, abs=5e-5)
    assert found["coco_panoptic/PQ_st"] == pytest.approx(pq_st, abs=5e-5)
    assert found["coco_panoptic/PQ_th"] == pytest.approx(100.0)


@pytest.mark.real
def test_stuff_alone_is_half() -> None:
    found = scores(pair_metric(), perfect(4096, instances=False))
    assert found["coco_panoptic/PQ"] == pytest.approx(50.0)
    assert (found["coco_panoptic/PQ_th"], found["coco_panoptic/PQ_st"]) == (0.0, pytest.approx(100.0))


@pytest.mark.real
def test_box_fill_of_the_truth() -> None:
    """At the published threshold nothing is filled; at 0.2, 6,548 and 1,130 pixels are."""
    base = dict(stuff_area_limit=4900, mask_overlap=0.37)
    assert scores(pair_metric(), perfect(**base, box_fill=0.5))["coco_panoptic/PQ"] == pytest.approx(100.0)
    found = scores(pair_metric(), perfect(**base, box_fill=0.2))
    assert found["coco_panoptic/PQ"] == pytest.approx(94.8711, abs=5e-5)
    assert found["coco_panoptic/PQ_th"] == pytest.approx(89.7423, abs=5e-5)
    void = perfect(**base, box_fill=None)
    filled = perfect(**base, box_fill=0.2)
    counts = [
        int((a["pred_panoptic_seg"]["sem_seg"] != b["pred_panoptic_seg"]["sem_seg"]).sum())
        for a, b in zip(void, filled, strict=True)
    ]
    assert counts == [6548, 1130]


@pytest.mark.real
def test_eight_classes_occur_in_the_real_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("mm_plugins.spatialflow.metric.print_log", lambda text, **_: said.append(text))
    found = scores(pair_metric(classwise=True), perfect(4096))
    # Four classes of things and four of stuff; the other 125 of 133 do not occur.
    assert "125 classes neither occur nor were predicted" in said[1]
    assert list(found) == [f"coco_panoptic/{m}{g}" for g in ("", "_th", "_st") for m in ("PQ", "SQ", "RQ")]
    assert set(found.values()) == {100.0}


@pytest.mark.parity
@pytest.mark.real
def test_equal_to_mmdets_metric_on_a_models_predictions(tmp_path: Path) -> None:
    """mmdet's CocoPanopticMetric, which runs panopticapi's counting, with the stand-in of this suite below
    it."""
    folder = real_data("panopticapi_sample")
    other = CocoPanopticMetric(
        ann_file=str(folder / "panoptic_examples.json"), seg_prefix=str(folder / "panoptic_examples"), nproc=1
    )
    other.dataset_meta = tiny.coco_sample().metainfo
    samples = perfect(8300, stuff_area_limit=8300, box_fill=0.1)
    rng = np.random.default_rng(0)
    for sample in samples:  # Noise, so that matches are not perfect.
        panoptic = sample["pred_panoptic_seg"]["sem_seg"]
        height, width = panoptic.shape[1:]
        for _ in range(30):
            top, left = int(rng.integers(height - 60)), int(rng.integers(width - 60))
            panoptic[:, top : top + 60, left : left + 60] = panoptic[0, top, left]
    ours = scores(pair_metric(), samples)
    other.process({}, samples)
    expected = other.evaluate(size=2)
    assert ours == expected
    assert 20 < ours["coco_panoptic/PQ"] < 95


def test_numbers_without_a_json(tmp_path: Path) -> None:
    """Segments and PNG that come with the image: the same counts; a crowd region as mmdet marks it."""
    write_set(tmp_path, STUFF_FIRST)
    metric = PanopticQuality()
    metric.dataset_meta = META
    panoptic = torch.full((1, 8, 8), 1)
    panoptic[0, 2:6, 2:5] = 1000
    sample = {
        "img_id": 1,
        "seg_map_path": str(tmp_path / "png" / "one.png"),
        "segments_info": [
            {"id": 300, "category": 0, "is_thing": True},
            {"id": 1, "category": 1, "is_thing": False},
        ],
        "pred_panoptic_seg": {"sem_seg": panoptic},
    }
    found = scores(metric, [sample])
    # Thing: 12 of 16; background: 48 of 52.
    assert found["coco_panoptic/PQ_th"] == pytest.approx(100 * 12 / 16)
    assert found["coco_panoptic/PQ_st"] == pytest.approx(100 * 48 / 52)
    sample["segments_info"][0]["is_thing"] = False
    found = scores(metric, [sample])
    assert math.isnan(found["coco_panoptic/PQ_th"])
    del sample["seg_map_path"]
    with pytest.raises(ValueError, match="add 'segments_info' and 'seg_map_path' to meta_keys"):
        metric.process({}, [sample])


def small_metric(folder: Path, **meta: Any) -> PanopticQuality:
    metric = PanopticQuality(str(folder / "set.json"), str(folder / "png"), classwise=False)
    metric.dataset_meta = {**META, "labels_follow_classes": True, **meta}
    return metric


def test_a_group_without_a_class_is_not_a_number(tmp_path: Path) -> None:
    write_set(tmp_path, STUFF_FIRST)
    metric = small_metric(tmp_path)
    sky = {"img_id": 1, "pred_panoptic_seg": {"sem_seg": torch.ones(1, 8, 8).long()}}
    assert scores(metric, [sky])["coco_panoptic/PQ_th"] == 0.0
    content = json.loads((tmp_path / "set.json").read_text())
    content["annotations"][0]["segments_info"] = content["annotations"][0]["segments_info"][1:]
    content["annotations"][0]["segments_info"][0]["area"] = 64
    (tmp_path / "set.json").write_text(json.dumps(content))
    cv2.imwrite(str(tmp_path / "png" / "one.png"), np.full((8, 8, 3), [0, 0, 1], np.uint8))
    found = scores(small_metric(tmp_path), [sky])
    assert math.isnan(found["coco_panoptic/PQ_th"])
    assert found["coco_panoptic/PQ"] == 100.0


def test_things_only_and_stuff_only_sets(tmp_path: Path) -> None:
    """Label 0 is stuff where there are no things; it is not taken for void."""
    write_set(tmp_path, [{**c, "isthing": 0} for c in STUFF_FIRST])
    metric = small_metric(tmp_path, thing_classes=(), stuff_classes=("cat", "sky"))
    panoptic = torch.ones(1, 8, 8).long()
    panoptic[0, 2:6, 2:6] = 0
    found = scores(metric, [{"img_id": 1, "pred_panoptic_seg": {"sem_seg": panoptic}}])
    assert found["coco_panoptic/PQ_st"] == 100.0
    assert math.isnan(found["coco_panoptic/PQ_th"])


def test_faults_are_named_before_the_first_image(tmp_path: Path) -> None:
    write_set(tmp_path, STUFF_FIRST)
    with pytest.raises(ValueError, match="Use dataset.type='PanopticDataset', which goes by name"):
        small_metric(tmp_path, labels_follow_classes=False)
    with pytest.raises(ValueError, match="things must come before stuff"):
        small_metric(tmp_path, classes=("sky", "cat"))
    with pytest.raises(ValueError, match="no category named 'dog'"):
        small_metric(tmp_path, classes=("dog", "sky"))
    with pytest.raises(ValueError, match="Give both, or neither"):
        PanopticQuality("a.json")
    with pytest.raises(ValueError, match="so there can be .*999 at most"):
        PanopticQuality().dataset_meta = {"classes": list(range(1000))}
    with pytest.raises(ValueError, match="so things and stuff cannot be told apart"):
        PanopticQuality().dataset_meta = {"classes": ("a",)}


def test_faults_of_an_image_are_named(tmp_path: Path) -> None:
    write_set(tmp_path, STUFF_FIRST, area=15)
    metric = small_metric(tmp_path)
    sample = {"img_id": 1, "pred_panoptic_seg": {"sem_seg": torch.ones(1, 8, 8).long()}}
    with pytest.raises(ValueError, match="has area 15 in the JSON and 16 pixels in the PNG"):
        metric.process({}, [sample])
    with pytest.raises(ValueError, match="Is it the JSON of another split"):
        metric.process({}, [{**sample, "img_id": 2}])
    write_set(tmp_path / "b", STUFF_FIRST)
    sample["pred_panoptic_seg"]["sem_seg"] = torch.ones(1, 4, 4).long()
    with pytest.raises(ValueError, match="Predict with rescale=True"):
        small_metric(tmp_path / "b").process({}, [sample])


def test_registered() -> None:
    assert METRICS.get("PanopticQuality") is PanopticQuality
