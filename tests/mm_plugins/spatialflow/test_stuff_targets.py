"""Targets and divisor of the stuff loss, and what the release does instead."""

import math

import pytest
import torch
import torch.nn.functional as F

from mm_plugins.spatialflow.stuff_targets import loss_area, stuff_labels
from tests.mm_plugins.spatialflow.reference import official_stuff_loss


def test_things_become_the_last_channel() -> None:
    """3 things, 2 stuff: labels 0-2 -> 2, 3 -> 0, 4 -> 1, 5 (void of mmdet) and 255 -> 255."""
    labels = torch.tensor([[[0, 1, 2, 3, 4, 5, 255]]], dtype=torch.uint8)
    assert stuff_labels(labels, 3, 2).tolist() == [[[2, 2, 2, 0, 1, 255, 255]]]


def test_every_image_has_its_own_area() -> None:
    """Images of 2x3 and 4x2 in a batch of 4x4: 6 + 8 pixels; what is beyond is ignored."""
    target, area = loss_area(torch.zeros(2, 4, 4).long(), [(2, 3), (4, 2)])
    assert area == 14
    assert (target == 0).sum(dim=(1, 2)).tolist() == [6, 8]
    assert (target[0, 2:] == 255).all()
    assert (target[1, :, 2:] == 255).all()


def test_the_given_labels_stay() -> None:
    labels = torch.zeros(1, 4, 4).long()
    loss_area(labels, [(2, 2)])
    loss_area(labels, [(2, 2)], mode="official")
    assert (labels == 0).all()


def _loss(logits: torch.Tensor, labels: torch.Tensor, sizes: list[tuple[int, int]], mode: str) -> float:
    target, area = loss_area(labels, sizes, mode=mode)  # type: ignore[arg-type]
    return float(F.cross_entropy(logits, target, ignore_index=255, reduction="sum") / area)


@pytest.mark.parametrize("copies", [1, 2, 4])
def test_a_repeated_batch_has_the_same_loss_and_the_releases_is_n_times_as_large(copies: int) -> None:
    """All logits 0 over C=3 classes: ln 3 on every pixel."""
    logits, labels = torch.zeros(copies, 3, 4, 5), torch.ones(copies, 4, 5).long()
    sizes = [(4, 5)] * copies
    assert _loss(logits, labels, sizes, "valid") == pytest.approx(math.log(3), rel=1e-6)
    assert _loss(logits, labels, sizes, "official") == pytest.approx(copies * math.log(3), rel=1e-6)


@pytest.mark.parity
def test_official_mode_is_the_release() -> None:
    """Against its broadcast; the release pads labels with 0, and all is cut at the first image's size."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 8, 8, generator=generator)
    labels = torch.randint(0, 5, (3, 8, 8), generator=generator)
    labels[0, 0] = 255
    sizes = [(6, 7), (5, 4), (8, 8)]
    padded = labels.clone()
    for image, (height, width) in zip(padded, sizes, strict=True):
        image[height:], image[:, width:] = 0, 0
    expected = float(official_stuff_loss(logits, padded, sizes[0], 1.0))
    assert _loss(logits, labels, sizes, "official") == pytest.approx(expected, rel=1e-6)


def test_an_image_without_area_divides_by_one() -> None:
    assert loss_area(torch.zeros(1, 4, 4).long(), [(0, 0)])[1] == 1
    assert loss_area(torch.zeros(1, 4, 4).long(), [(0, 0)], mode="official")[1] == 1
