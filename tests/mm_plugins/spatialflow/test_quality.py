"""Panoptic quality: by hand, against masks and pairs, and equal to panopticapi to the last digit."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_plugins.spatialflow.quality import (
    ImageCounts,
    count_image,
    count_pairs,
    mean_of_seen,
    panoptic_quality,
)
from mm_plugins.spatialflow.segment_ids import predicted_segments
from tests.mm_plugins.spatialflow.reference import PanopticImage, quality_by_pairs, random_images

RECORD = Path(__file__).resolve().parents[2] / "data" / "panoptic_pq" / "panopticapi.json"
NUM_THINGS, NUM_CLASSES = 4, 7


def counts(image: PanopticImage, num_classes: int = NUM_CLASSES) -> ImageCounts:
    ids, labels = predicted_segments(image.panoptic, num_classes)
    return count_image(
        image.gt,
        [s["id"] for s in image.segments],
        [s["category_id"] for s in image.segments],
        [s["iscrowd"] for s in image.segments],
        image.panoptic,
        ids,
        labels,
    )


def row(gt: list[int], pred: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([gt]), np.array([pred])


def test_two_segments_by_hand() -> None:
    """Ten pixels; class 0 covers 5 and 4 of them are found with 1 beyond: IoU 4/6. Class 1 covers 5, found
    are 4 of them: IoU 4/5 (the fifth belongs to the first prediction). PQ = IoU, as nothing is wrong."""
    gt, pred = row([1, 1, 1, 1, 1, 2, 2, 2, 2, 2], [9, 8, 8, 8, 8, 8, 7, 7, 7, 7])
    found = count_image(gt, [1, 2], [0, 1], [False, False], pred, [7, 8], [1, 0])
    assert found.matched_M.tolist() == [0, 1]
    assert found.iou_M.tolist() == [4 / 6, 4 / 5]
    assert not len(found.false_positive)
    assert not len(found.false_negative)
    quality = panoptic_quality([found], 3)
    assert quality.pq_C.tolist()[:2] == [4 / 6, 4 / 5]
    assert math.isnan(quality.pq_C[2])


def test_half_is_no_match() -> None:
    """IoU must exceed 1/2: intersection 2 of union 4 is a miss and a false positive; PQ 0, SQ 0, RQ 0."""
    gt, pred = row([1, 1, 1, 3], [5, 5, 6, 5])
    found = count_image(gt, [1, 3], [0, 1], [False, False], pred, [5, 6], [0, 2])
    assert found.false_positive.tolist() == [0, 2]
    assert found.false_negative.tolist() == [0, 1]
    quality = panoptic_quality([found], 3)
    assert [quality.pq_C.tolist(), quality.sq_C.tolist(), quality.rq_C.tolist()] == [[0.0] * 3] * 3


def test_factors_by_hand() -> None:
    """One match with IoU 3/4, one false positive, two misses of a class: RQ = 1/(1 + 1/2 + 2/2) = 0.4,
    SQ = 0.75, PQ = 0.3."""
    image = ImageCounts(np.array([0]), np.array([0.75]), np.array([0]), np.array([0, 0]))
    quality = panoptic_quality([image], 1)
    assert (quality.pq_C[0], quality.sq_C[0], quality.rq_C[0]) == pytest.approx((0.3, 0.75, 0.4), abs=1e-15)
    assert (quality.tp_C[0], quality.fp_C[0], quality.fn_C[0]) == (1, 1, 2)


def test_void_pixels_do_not_count_against_a_prediction() -> None:
    """The prediction covers the segment of 3 and 2 void pixels: IoU 3/3."""
    gt, pred = row([0, 0, 1, 1, 1], [4, 4, 4, 4, 4])
    found = count_image(gt, [1], [0], [False], pred, [4], [0])
    assert found.iou_M.tolist() == [1.0]


def test_predictions_on_void_or_crowd_are_forgiven() -> None:
    """Mostly void (2 of 3 pixels), mostly crowd of its class, and mostly crowd of another class."""
    gt, pred = row([0, 0, 1, 2, 2, 2, 2, 2, 2], [5, 5, 5, 6, 6, 6, 7, 7, 7])
    found = count_image(gt, [1, 2], [0, 1], [False, True], pred, [5, 6, 7], [1, 1, 2])
    assert found.false_positive.tolist() == [2]
    # The crowd region itself is not missed.
    assert found.false_negative.tolist() == [0]


def test_exactly_half_void_is_a_false_positive() -> None:
    gt, pred = row([0, 1, 1, 1], [5, 5, 6, 6])
    found = count_image(gt, [1], [0], [False], pred, [5, 6], [1, 0])
    assert found.false_positive.tolist() == [1]
    assert found.iou_M.tolist() == [2 / 3]


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parity
def test_equal_to_panopticapi_to_the_last_digit(seed: int) -> None:
    expected = json.loads(RECORD.read_text())[seed]
    quality = panoptic_quality([counts(image) for image in random_images(seed)], NUM_CLASSES)
    found = [quality.tp_C, quality.fp_C, quality.fn_C]
    assert [list(c) for c in zip(*(x.tolist() for x in found), strict=True)] == list(
        expected["counts"].values()
    )
    groups = {"all": None, "things": range(NUM_THINGS), "stuff": range(NUM_THINGS, NUM_CLASSES)}
    for name, chosen in groups.items():
        for key, values in (("pq", quality.pq_C), ("sq", quality.sq_C), ("rq", quality.rq_C)):
            mean, seen = mean_of_seen(values, chosen)
            if expected[name] is None:
                assert seen == 0
                assert math.isnan(mean)
            else:
                assert mean == expected[name][key]
                assert seen == expected[name]["n"]
            if name == "all":
                each = [expected["classes"][str(c)][key] for c in range(NUM_CLASSES)]
                assert np.nan_to_num(values).tolist() == each


@given(seed=st.integers(100, 10**6))
@settings(max_examples=20, deadline=None)
def test_equal_to_masks_and_pairs(seed: int) -> None:
    """Same pixels, same formula; sums of at most a few IoUs in another order differ by rounding only."""
    images = random_images(seed, num_images=2)
    # One crowd region a class in the reference.
    images = [
        image
        for image in images
        if len({s["category_id"] for s in image.segments if s["iscrowd"]})
        == sum(s["iscrowd"] for s in image.segments)
    ]
    quality = panoptic_quality([counts(image) for image in images], NUM_CLASSES)
    found = np.stack([quality.pq_C, quality.sq_C, quality.rq_C], axis=1)
    np.testing.assert_allclose(found, np.array(quality_by_pairs(images, NUM_CLASSES)), rtol=0, atol=1e-12)


@given(st.integers(0, 40), st.integers(1, 30), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_pairs_equal_a_dictionary(height: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 4, size=(height, width)) * 2**22
    second = rng.integers(0, 3, size=(height, width)) * 700_000
    expected: dict[tuple[int, int], int] = {}
    for pair in zip(first.ravel().tolist(), second.ravel().tolist(), strict=True):
        expected[pair] = expected.get(pair, 0) + 1
    pairs = count_pairs(first, second)
    found = zip(pairs.first_K.tolist(), pairs.second_K.tolist(), strict=True)
    assert dict(zip(found, pairs.pixels_K.tolist(), strict=True)) == expected
    assert list(expected) or not len(pairs.first_K)


def test_truth_against_itself_is_perfect_and_relabelled_is_nothing() -> None:
    gt = np.repeat(np.arange(1, 5), 6).reshape(4, 6)
    same = count_image(gt, [1, 2, 3, 4], [0, 0, 1, 2], [False] * 4, gt, [1, 2, 3, 4], [0, 0, 1, 2])
    assert mean_of_seen(panoptic_quality([same], 3).pq_C) == (1.0, 3)
    other = count_image(gt, [1, 2, 3, 4], [0, 0, 1, 2], [False] * 4, gt, [1, 2, 3, 4], [1, 2, 0, 0])
    assert mean_of_seen(panoptic_quality([other], 3).pq_C) == (0.0, 3)


def test_images_add_up_in_any_number() -> None:
    image = random_images(3)[0]
    once, twice = panoptic_quality([counts(image)], 7), panoptic_quality([counts(image)] * 2, 7)
    np.testing.assert_allclose(twice.pq_C, once.pq_C, rtol=1e-14, atol=0)
    assert twice.tp_C.tolist() == (2 * once.tp_C).tolist()
    assert np.isnan(panoptic_quality([], 2).pq_C).all()
    mean, seen = mean_of_seen(np.array([math.nan]))
    assert math.isnan(mean)
    assert seen == 0


def test_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match="Predict with rescale=True"):
        count_pairs(np.zeros((2, 3), int), np.zeros((3, 2), int))
