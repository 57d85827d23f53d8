"""Greedy and soft suppression against the sequential definition, by hand and through ``mmcv.ops``."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mm_plugins  # noqa: F401
from mm_plugins.compat.portable import nms as core
from tests.mm_plugins.compat import reference

# A and B overlap by 8x10 of 12x10 (IoU 2/3), B and C likewise, A and C by 6x10 of 14x10 (3/7).
CHAIN = torch.tensor([[0.0, 0, 10, 10], [2, 0, 12, 10], [4, 0, 14, 10]])


def random_boxes(num_boxes: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(num_boxes, 2, generator=generator, dtype=dtype) * 60
    size = torch.rand(num_boxes, 2, generator=generator, dtype=dtype) * 40
    scores = torch.randperm(num_boxes, generator=generator).to(dtype) / max(num_boxes, 1)
    return torch.cat([corner, corner + size], 1), scores


def test_removed_boxes_remove_nothing() -> None:
    """A removes B (2/3 > 0.5); C overlaps A by 3/7 only and B is gone, so C stays."""
    keep = core.nms(CHAIN, torch.tensor([0.9, 0.8, 0.7]), iou_threshold=0.5)
    assert keep.tolist() == [0, 2]
    assert core.nms(CHAIN, torch.tensor([0.8, 0.9, 0.7]), iou_threshold=0.5).tolist() == [1]


def test_the_threshold_itself_keeps() -> None:
    """Two boxes of 2x1 that share 1x1: IoU is the float 1/3; nms is strictly >, nms_match is >=."""
    boxes = torch.tensor([[0.0, 0, 2, 1], [1, 0, 3, 1]])
    scores = torch.tensor([0.9, 0.8])
    third = float(torch.tensor(1.0) / 3)
    assert core.nms(boxes, scores, iou_threshold=third).tolist() == [0, 1]
    assert core.nms(boxes, scores, iou_threshold=third - 1e-6).tolist() == [0]
    dets = torch.cat([boxes, scores[:, None]], 1)
    assert core.nms_match(dets, iou_threshold=third) == [[0, 1]]
    assert core.nms_match(dets, iou_threshold=third + 1e-6) == [[0], [1]]


def test_offset_counts_pixels() -> None:
    """[0, 1] and [1, 2]: no common length, but one of three pixel columns with offset 1 (IoU 1/3)."""
    boxes = torch.tensor([[0.0, 0, 1, 1], [1, 0, 2, 1]])
    scores = torch.tensor([0.9, 0.8])
    assert core.nms(boxes, scores, iou_threshold=0.3, offset=0).tolist() == [0, 1]
    assert core.nms(boxes, scores, iou_threshold=0.3, offset=1).tolist() == [0]


def test_equal_scores_keep_their_order() -> None:
    boxes = torch.arange(40.0)[:, None] * 10 + torch.tensor([0.0, 0, 5, 5])
    assert core.nms(boxes, torch.ones(40), iou_threshold=0.5).tolist() == list(range(40))
    assert core.nms(CHAIN, torch.ones(3), iou_threshold=0.5).tolist() == [0, 2]


@pytest.mark.parametrize("block", [1, 256])
def test_boxes_without_area_and_not_a_number_stay(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """0 / 0 is no overlap, within a block and between blocks."""
    monkeypatch.setattr(core, "BLOCK_BOXES", block)
    boxes = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5], [torch.nan, 0, 1, 1], [0, 0, 10, 10], [0, 0, 10, 10]])
    assert core.nms(boxes, torch.tensor([5.0, 4, 3, 2, 1]), iou_threshold=0.5).tolist() == [0, 1, 2, 3]


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    num_boxes=st.integers(0, 40),
    seed=st.integers(0, 999),
    threshold=st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]),
    offset=st.integers(0, 1),
    block=st.sampled_from([1, 7, 256]),
)
def test_equals_sequential_definition(
    num_boxes: int, seed: int, threshold: float, offset: int, block: int
) -> None:
    """Small blocks and tiles make the borders between them count."""
    boxes, scores = random_boxes(num_boxes, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "BLOCK_BOXES", block)
        patch.setattr(core, "TILE_BOXES", 5)
        got = core.nms(boxes, scores, iou_threshold=threshold, offset=offset).tolist()
    assert got == reference.nms(boxes.numpy(), scores.numpy(), threshold, offset)


def test_ten_thousand_boxes_equal_the_fast_sequential_loop() -> None:
    """The loop of the definition, one kept box at a time, in fp32 and on boxes of every density."""
    boxes, scores = random_boxes(10_000, 0, torch.float32)
    boxes = boxes * torch.tensor([20.0, 20, 20, 20])
    order = scores.argsort(descending=True)
    alive = torch.ones(len(boxes), dtype=torch.bool)
    keep = []
    for i in order.tolist():
        if alive[i]:
            keep.append(i)
            size = torch.minimum(boxes[i, 2:], boxes[:, 2:]) - torch.maximum(boxes[i, :2], boxes[:, :2])
            common = size.clamp(min=0).prod(1)
            areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
            alive &= ~(common / (areas[i] + areas - common) > 0.5)
    assert core.nms(boxes, scores, iou_threshold=0.5).tolist() == keep


def test_half_precision_is_compared_in_fp32() -> None:
    boxes, scores = random_boxes(100, 3, torch.float32)
    half = boxes.half()
    expected = core.nms(half.float(), scores, iou_threshold=0.5)
    assert torch.equal(core.nms(half, scores, iou_threshold=0.5), expected)


def test_nms_through_mmcv() -> None:
    from mmcv.ops import nms

    dets, keep = nms(CHAIN, torch.tensor([0.9, 0.8, 0.7]), 0.5)
    assert keep.tolist() == [0, 2]
    assert torch.equal(dets, torch.cat([CHAIN[[0, 2]], torch.tensor([[0.9], [0.7]])], 1))
    dets, keep = nms(CHAIN.numpy(), np.array([0.9, 0.8, 0.7], dtype=np.float32), 0.5, score_threshold=0.75)
    assert keep.tolist() == [0]
    assert nms(CHAIN[:0], torch.zeros(0), 0.5)[1].shape == (0,)


def test_batched_nms_keeps_classes_apart() -> None:
    """Boxes of one place and two classes survive, of one class do not; score order overall."""
    from mmcv.ops import batched_nms

    boxes = CHAIN[[0, 0, 0]]
    dets, keep = batched_nms(
        boxes, torch.tensor([0.7, 0.9, 0.8]), torch.tensor([0, 1, 1]), {"type": "nms", "iou_threshold": 0.5}
    )
    assert keep.tolist() == [1, 0]
    torch.testing.assert_close(dets[:, 4], torch.tensor([0.9, 0.7]))


@pytest.mark.parametrize(
    ("method", "second"), [("linear", 0.8 / 3), ("gaussian", 0.8 * np.exp(-4 / 9 / 0.5)), ("naive", None)]
)
def test_soft_nms_by_hand(method: str, second: float | None) -> None:
    """A lowers B by 1 - 2/3 or exp(-(2/3)^2 / 0.5), or to 0 (below min_score: dropped)."""
    from mmcv.ops import soft_nms

    dets, keep = soft_nms(
        CHAIN[:2], torch.tensor([0.9, 0.8]), iou_threshold=0.5, sigma=0.5, min_score=0.01, method=method
    )
    assert keep.tolist() == ([0] if second is None else [0, 1])
    expected = [0.9] if second is None else [0.9, second]
    torch.testing.assert_close(dets[:, 4], torch.tensor(expected, dtype=torch.float32))


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    num_boxes=st.integers(0, 25),
    seed=st.integers(0, 999),
    method=st.sampled_from(["naive", "linear", "gaussian"]),
    offset=st.integers(0, 1),
    min_score=st.sampled_from([0.0, 0.05, 0.4]),
)
def test_soft_nms_equals_sequential_definition(
    num_boxes: int, seed: int, method: str, offset: int, min_score: float
) -> None:
    """The best box of all is taken even if it lies below min_score, so scores start above it."""
    boxes, scores = random_boxes(num_boxes, seed)
    scores = 0.4 + scores / 2
    number = {"naive": 0, "linear": 1, "gaussian": 2}[method]
    dets, keep = core.soft_nms(
        boxes, scores, iou_threshold=0.3, sigma=0.4, min_score=min_score, method=number, offset=offset
    )
    expected = reference.soft_nms(boxes.numpy(), scores.numpy(), 0.3, 0.4, min_score, method, offset)
    if method == "naive" and min_score == 0.0:
        # Zeros are ties; their order is the working array's.
        expected = sorted(expected, key=lambda pair: (-pair[1], pair[0]))
        pairs = sorted(zip(keep.tolist(), dets[:, 4].tolist(), strict=True), key=lambda p: (-p[1], p[0]))
    else:
        pairs = list(zip(keep.tolist(), dets[:, 4].tolist(), strict=True))
    assert [i for i, _ in pairs] == [i for i, _ in expected]
    np.testing.assert_allclose([s for _, s in pairs], [s for _, s in expected], rtol=1e-12)
    assert torch.equal(dets[:, :4], boxes[keep])


def test_soft_nms_without_area_lowers_nothing() -> None:
    """Two equal points: 0 / 0 counts as no overlap instead of spoiling the score with NaN."""
    points = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5]])
    dets, keep = core.soft_nms(points, torch.tensor([0.9, 0.8]), iou_threshold=0.3, method=2)
    assert keep.tolist() == [0, 1]
    torch.testing.assert_close(dets[:, 4], torch.tensor([0.9, 0.8]))


def test_dropped_places_are_filled_from_the_back() -> None:
    """Places 1 and 3 of five drop out: 1 takes the last that stays (4), 3 lies beyond the new end."""
    assert core._refill(np.array([False, True, False, True, False])).tolist() == [0, 4, 2]
    assert core._refill(np.array([True, True, False, False, False])).tolist() == [4, 3, 2]


@settings(derandomize=True, deadline=None, max_examples=20)
@given(num_boxes=st.integers(0, 30), seed=st.integers(0, 999), threshold=st.sampled_from([0.2, 0.5]))
def test_nms_match_equals_definition(num_boxes: int, seed: int, threshold: float) -> None:
    boxes, scores = random_boxes(num_boxes, seed)
    got = core.nms_match(torch.cat([boxes, scores[:, None]], 1), iou_threshold=threshold)
    assert got == reference.nms_match(boxes.numpy(), scores.numpy(), threshold)


def test_nms_match_through_mmcv() -> None:
    from mmcv.ops import nms_match

    dets = torch.cat([CHAIN, torch.tensor([[0.7], [0.9], [0.8]])], 1)
    assert [group.tolist() for group in nms_match(dets, 0.5)] == [[1, 2, 0]]
    assert nms_match(dets[:0], 0.5) == []
