"""Fusion: by hand, against the release's wording, and against mmdet's HeuristicFusionHead."""

from typing import Any

import numpy as np
import pytest
import torch
from mmdet.models.seg_heads.panoptic_fusion_heads import HeuristicFusionHead
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor

from mm_plugins.spatialflow.fusion import fuse
from tests.mm_plugins.spatialflow.reference import greedy_fusion


def instances(seed: int, num: int = 12, size: tuple[int, int] = (60, 80)) -> dict[str, Any]:
    """Random boxes with holes in their masks, scores with ties, random stuff with 2 classes and things."""
    rng = np.random.default_rng(seed)
    height, width = size
    masks = np.zeros((num, height, width), bool)
    corner = rng.uniform(-3, [width - 8, height - 8], size=(num, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0, 35, size=(num, 2))], axis=1).clip(
        0, [width, height, width, height]
    )
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        # As pasted masks do, some reach one pixel beyond their box.
        rows = slice(max(int(np.floor(y1)) - 1, 0), int(np.ceil(y2)) + 1)
        columns = slice(max(int(np.floor(x1)) - 1, 0), int(np.ceil(x2)) + 1)
        mask[rows, columns] = rng.random(mask[rows, columns].shape) < rng.uniform(0, 1.2)
    return {
        "masks": masks,
        "boxes": boxes.astype(np.float32),
        "scores": (rng.integers(3, 10, size=num) / 10).astype(np.float32),
        "labels": rng.integers(0, 4, size=num),
        "stuff": rng.integers(0, 3, size=(6, 8)).repeat(10, axis=0).repeat(10, axis=1),
    }


def ours(case: dict[str, Any], **options: Any) -> Tensor:
    names = ("masks", "boxes", "scores", "labels", "stuff")
    tensors = [torch.from_numpy(np.asarray(case[name])) for name in names]
    return fuse(*tensors, num_things=4, num_stuff=2, **options)


OPTIONS = {"score_thr": 0.37, "mask_overlap": 0.37, "stuff_area_limit": 150}


@pytest.mark.parity
@pytest.mark.parametrize("box_fill", [None, 0.2, 0.5])
def test_equal_to_the_releases_wording(box_fill: float | None) -> None:
    for seed in range(20):
        case = instances(seed)
        expected = greedy_fusion(**case, num_things=4, num_stuff=2, box_fill=box_fill, **OPTIONS)
        for cropped in (True, False):
            found = ours(case, box_fill=box_fill, cropped=cropped, **OPTIONS)
            assert found.dtype == torch.int32
            np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parity
def test_without_box_fill_equal_to_mmdets_head() -> None:
    """Scores without ties: mmdet's sort is not stable. It has no score threshold of its own."""
    head = HeuristicFusionHead(4, 2, test_cfg=ConfigDict(mask_overlap=0.37, stuff_area_limit=150))
    for seed in range(40):
        case = instances(seed)
        case["scores"] = np.random.default_rng(seed).permutation(12).astype(np.float32) / 12
        found = InstanceData(**{name: torch.from_numpy(case[name]) for name in ("masks", "scores", "labels")})
        found.bboxes = torch.from_numpy(case["boxes"])
        logits = torch.nn.functional.one_hot(torch.from_numpy(case["stuff"]), 3).permute(2, 0, 1).float()
        (expected,) = head.predict([found], [logits])
        result = ours(case, box_fill=None, **(OPTIONS | {"score_thr": 0.0}))
        assert torch.equal(result, expected.sem_seg[0].int())


@pytest.mark.parametrize(
    ("right", "pixels"), [(30, 2500), (35, 2500), (40, 1500)], ids=["60 % free", "50 % free", "40 % free"]
)
def test_box_fill_by_hand(right: int, pixels: int) -> None:
    """100x100, box (10, 10, 60, 60) of 2500 pixels, mask x in [10, right): 1000, 1250, 1500 pixels. The box
    is filled where at least half of it is free."""
    mask = torch.zeros(1, 100, 100, dtype=torch.bool)
    mask[0, 10:60, 10:right] = True
    box, one = torch.tensor([[10.0, 10, 60, 60]]), torch.tensor([0.9])
    nothing = torch.full((100, 100), 1)
    panoptic = fuse(mask, box, one, torch.tensor([0]), nothing, num_things=1, num_stuff=1)
    assert int((panoptic == 1000).sum()) == pixels
    assert int((panoptic == 2).sum()) == 10_000 - pixels


def test_box_of_no_size_is_skipped() -> None:
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    boxes = torch.tensor([[3.2, 3.2, 3.9, 6.0], [8.0, 8.0, 9.0, 9.0]])
    panoptic = fuse(
        mask,
        boxes,
        torch.tensor([0.9, 0.8]),
        torch.tensor([0, 0]),
        torch.ones(8, 8).long(),
        num_things=1,
        num_stuff=1,
    )
    assert (panoptic == 2).all()


def test_box_of_a_rejected_mask_gets_an_id_of_its_own() -> None:
    """The second mask lies in the first and is rejected; its box is 3/4 free and becomes an instance."""
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[:, :2, :2] = True
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 4, 4]])
    panoptic = fuse(
        masks,
        boxes,
        torch.tensor([0.9, 0.8]),
        torch.tensor([0, 1]),
        torch.full((8, 8), 1),
        num_things=2,
        num_stuff=1,
    )
    assert int((panoptic == 1000).sum()) == 4
    assert int((panoptic == 2001).sum()) == 12


def test_thresholds_are_strict_where_the_release_is() -> None:
    """Score 0.5 passes score_thr 0.5; a mask of which exactly half is taken is kept at mask_overlap 0.5; a
    stuff class of exactly the limit is laid."""
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0, 0], masks[1, :2] = True, True
    boxes, labels = torch.tensor([[0.0, 0, 4, 1], [0, 0, 4, 2]]), torch.tensor([0, 0])
    stuff = torch.zeros(4, 4).long()
    settings: dict[str, Any] = dict(num_things=1, num_stuff=1, score_thr=0.5, mask_overlap=0.5, box_fill=None)
    panoptic = fuse(masks, boxes, torch.tensor([0.75, 0.5]), labels, stuff, stuff_area_limit=8, **settings)
    assert panoptic.tolist() == [[1000] * 4, [2000] * 4, [1] * 4, [1] * 4]
    panoptic = fuse(masks, boxes, torch.tensor([0.75, 0.49]), labels, stuff, stuff_area_limit=13, **settings)
    assert panoptic.tolist() == [[1000] * 4] + [[2] * 4] * 3
    masks[0, 1, 0] = True  # Now 5 of 8 are taken.
    panoptic = fuse(masks, boxes, torch.tensor([0.75, 0.5]), labels, stuff, stuff_area_limit=8, **settings)
    assert (panoptic != 2000).all()


def test_equal_scores_keep_their_order() -> None:
    """33 masks on one place with one score: the first wins; an unstable sort of more than 16 shuffles."""
    masks = torch.ones(33, 4, 4, dtype=torch.bool)
    boxes = torch.tensor([[0.0, 0, 4, 4]]).repeat(33, 1)
    panoptic = fuse(
        masks,
        boxes,
        torch.full((33,), 0.9),
        torch.arange(33),
        torch.zeros(4, 4).long(),
        num_things=33,
        num_stuff=1,
    )
    assert (panoptic == 1000).all()


def test_nothing_found_leaves_stuff() -> None:
    panoptic = fuse(
        torch.zeros(0, 80, 80, dtype=torch.bool),
        torch.zeros(0, 4),
        torch.zeros(0),
        torch.zeros(0).long(),
        torch.zeros(80, 80).long(),
        num_things=1,
        num_stuff=1,
    )
    assert (panoptic == 1).all()
