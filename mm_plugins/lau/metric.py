"""Boundary IoU as a metric of mmseg's evaluator."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from mmseg.registry import METRICS

from mm_plugins.lau.boundary import boundary_areas, boundary_width


@METRICS.register_module()
class BoundaryIoUMetric(BaseMetric):
    """Mean boundary IoU over classes: ``val_evaluator=[..., dict(type="BoundaryIoUMetric")]``.

    Intersections and unions are summed over all images before the division, as mmseg's IoUMetric does.

    Args:
        ratio: Width of the boundary region as a share of the image's diagonal.
        ignore_index: Label of pixels that do not count.
        collect_device: ``cpu`` or ``gpu``: where results of several processes meet.
        prefix: Put before the metric's name in the log.

    Raises:
        ValueError: If the ratio is out of range.

    Source: Boundary IoU, Cheng et al., CVPR 2021.
    """

    def __init__(
        self,
        ratio: float = 0.02,
        ignore_index: int = 255,
        collect_device: str = "cpu",
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        if not 0 < ratio < 1:
            raise ValueError(f"ratio must lie in (0, 1); got {ratio}. It is a share: 0.02 for 2 %.")
        self.ratio, self.ignore_index = ratio, ignore_index

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Count one batch; called by the evaluator."""
        num_classes = len(self.dataset_meta["classes"])
        for sample in data_samples:
            predicted = sample["pred_sem_seg"]["data"].cpu()
            label = sample["gt_sem_seg"]["data"].to(predicted)
            depth = boundary_width(label.shape[1], label.shape[2], self.ratio)
            areas = boundary_areas(predicted, label, num_classes, depth=depth, ignore_index=self.ignore_index)
            self.results.append(areas)

    def compute_metrics(self, results: list) -> dict[str, Any]:
        """Mean over the classes that occur, in per cent, and the value of each class in the log."""
        intersection = torch.stack([areas[0] for areas in results]).sum(0)
        union = torch.stack([areas[1] for areas in results]).sum(0)
        each = 100 * intersection / union
        names = self.dataset_meta["classes"]
        text = ", ".join(f"{name} {value:.2f}" for name, value in zip(names, each.tolist(), strict=True))
        print_log(f"boundary IoU of each class: {text}", logger="current")
        return {"mBIoU": round(each.nanmean().item(), 2)}
