"""Small faults of mmdet 3.3.0 and mmseg 1.2.2 that stop published configs, mended until a release does.

Each repair names the upstream report if there is one, touches one place, leaves a mended release alone.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

from mmengine.logging import print_log
from torch import Tensor

_MARK = "_mended_by_mm_plugins"


def weighted_mean_factor(label: Tensor, class_weight: Tensor, ignore_index: int) -> Tensor:
    """Sum of the class weights of all labels that count: PyTorch's own denominator of a weighted mean.

    Args:
        label: Class of each position, any shape; `ignore_index` marks positions that do not count.
        class_weight: Weight of each class (C,).
        ignore_index: The label that does not count.

    Returns:
        Scalar, dtype of `class_weight`.

    Source: ``torch.nn.CrossEntropyLoss``, reduction "mean".
    """
    counts = label != ignore_index
    return class_weight[label[counts]].sum()


def repair_weighted_cross_entropy(module: ModuleType) -> None:
    """mmseg 1.2.2: class weights and ignored labels (255 in every Cityscapes label) no longer clash.

    ``cross_entropy`` indexes the class weights with the ignored label, which is an IndexError on the CPU and
    an assert on CUDA (mmseg issues 3734 and 3831; hits CGNet). The same mean is handed in ready made.

    Args:
        module: ``mmseg.models.losses.cross_entropy_loss``.
    """
    original: Callable[..., Tensor] = module.cross_entropy
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def cross_entropy(
        pred: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        class_weight: Tensor | None = None,
        reduction: str = "mean",
        avg_factor: Any = None,
        ignore_index: int = -100,
        avg_non_ignore: bool = False,
    ) -> Tensor:
        if class_weight is not None and avg_factor is None and reduction == "mean":
            avg_factor = weighted_mean_factor(label, class_weight, ignore_index)
        return original(
            pred, label, weight, class_weight, reduction, avg_factor, ignore_index, avg_non_ignore
        )

    setattr(cross_entropy, _MARK, True)
    module.cross_entropy = cross_entropy  # type: ignore[attr-defined]


def repair_ssd_prediction(head: type) -> None:
    """mmdet 3.3.0: SSD predicts again.

    The shared prediction code reads ``self.loss_cls``, which ``SSDHead`` never sets (mmdet issues 11063,
    11305 and 11780). It only asks whether that loss counts classes its own way, which ``None`` answers with
    no.

    Args:
        head: ``mmdet.models.dense_heads.SSDHead``.
    """
    if not hasattr(head, "loss_cls"):
        head.loss_cls = None  # type: ignore[attr-defined]


def repair_roi_align_choice(roi_align: type, *, torchvision_imports: bool) -> None:
    """``use_torchvision=True`` (CrowdDet) runs on mmcv's own aligned RoIAlign where torchvision is not to be
    had.

    Both compute the same numbers; where torchvision imports, nothing changes.

    Args:
        roi_align: ``mmcv.ops.RoIAlign``.
        torchvision_imports: Whether torchvision can be imported.
    """
    original: Callable[..., None] = roi_align.__init__  # type: ignore[misc]
    if torchvision_imports or getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.use_torchvision:
            print_log("RoIAlign: torchvision does not import, mmcv's own op serves", logger="current")
        self.use_torchvision = False

    setattr(init, _MARK, True)
    roi_align.__init__ = init  # type: ignore[misc]


def boxes_meet_image(boxes_N4: Tensor, img_h: int, img_w: int) -> bool:
    """Whether the rectangle around all boxes (x1, y1, x2, y2 in pixels) has a pixel of the image in it."""
    low, high = boxes_N4.amin(dim=0).tolist(), boxes_N4.amax(dim=0).tolist()
    return low[0] < img_w and low[1] < img_h and high[2] > 0 and high[3] > 0


def repair_mask_paste(module: ModuleType) -> None:
    """mmdet 3.3.0 on the CPU: a mask whose box lies outside of the image is pasted as zeros.

    The CPU's short cut cuts the canvas to the boxes and asks for a range that ends before it begins; the
    whole canvas, which the CUDA path always takes, has no such trouble (hits QueryInst, whose boxes are not
    clipped).

    Args:
        module: ``mmdet.models.roi_heads.mask_heads.fcn_mask_head``.
    """
    original: Callable[..., tuple] = module._do_paste_mask
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def paste(masks: Tensor, boxes: Tensor, img_h: int, img_w: int, skip_empty: bool = True) -> tuple:
        skip_empty = skip_empty and boxes_meet_image(boxes, img_h, img_w)
        return original(masks, boxes, img_h, img_w, skip_empty=skip_empty)

    setattr(paste, _MARK, True)
    module._do_paste_mask = paste  # type: ignore[attr-defined]


def repair_upstream(*, torchvision_imports: bool) -> None:
    """Apply all repairs of this file; idempotent.

    Args:
        torchvision_imports: Whether torchvision can be imported.
    """
    import mmcv.ops
    import mmdet.models.dense_heads

    repair_ssd_prediction(mmdet.models.dense_heads.SSDHead)
    repair_mask_paste(importlib.import_module("mmdet.models.roi_heads.mask_heads.fcn_mask_head"))
    repair_roi_align_choice(mmcv.ops.RoIAlign, torchvision_imports=torchvision_imports)
    if importlib.util.find_spec("mmseg") is not None:
        repair_weighted_cross_entropy(importlib.import_module("mmseg.models.losses.cross_entropy_loss"))
