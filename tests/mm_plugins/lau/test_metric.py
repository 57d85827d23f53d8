"""The metric sums areas over images before it divides."""

import pytest
import torch
from mmengine.registry import init_default_scope
from mmseg.registry import METRICS

from mm_plugins.lau import BoundaryIoUMetric, boundary_iou


def sample(predicted: torch.Tensor, label: torch.Tensor) -> dict:
    return {"pred_sem_seg": {"data": predicted[None]}, "gt_sem_seg": {"data": label[None]}}


def test_equals_the_function_over_all_images() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted, label = (torch.randint(2, (4, 20, 30), generator=generator) for _ in range(2))
    label[0, :4] = 255
    init_default_scope("mmseg")
    metric = METRICS.build({"type": "BoundaryIoUMetric", "ratio": 0.05})
    metric.dataset_meta = {"classes": ("a", "b", "never")}
    for index in range(0, 4, 2):
        batch = [sample(predicted[i], label[i]) for i in (index, index + 1)]
        metric.process({}, batch)
    found = metric.evaluate(4)
    wanted = 100 * boundary_iou(predicted, label, 3, ratio=0.05)[:2].mean().item()
    assert found["mBIoU"] == pytest.approx(wanted, abs=0.006)


def test_ratio_is_a_share() -> None:
    with pytest.raises(ValueError, match=r"ratio must lie in \(0, 1\); got .*2.* It is a share"):
        BoundaryIoUMetric(ratio=2)
