"""Record what a compiled mmcv answers: ``python record_parity.py OUT.npz`` with an interpreter that has one.

The file holds every input next to its results, so that nothing depends on a random generator. Run it only to
renew the file; the tests read the recorded one.
"""

import sys

import mmcv
import numpy as np
import torch
from mmcv.ops import (
    PSAMask,
    batched_nms,
    bbox_overlaps,
    deform_conv2d,
    modulated_deform_conv2d,
    nms,
    nms_match,
    roi_align,
    soft_nms,
)
from torch import Tensor

Record = dict[str, np.ndarray]


def keep(record: Record, case: str, **tensors: Tensor) -> None:
    """Store tensors under ``case/name``."""
    for name, tensor in tensors.items():
        record[f"{case}/{name}"] = tensor.detach().numpy()


def record_boxes(record: Record, generator: torch.Generator) -> None:
    for num_boxes in (1, 400):
        corner = torch.rand(num_boxes, 2, generator=generator) * 120
        boxes = torch.cat([corner, corner + torch.rand(num_boxes, 2, generator=generator) * 60], 1)
        scores = torch.randperm(num_boxes, generator=generator) / num_boxes
        labels = torch.randint(0, 3, (num_boxes,), generator=generator)
        case = f"boxes{num_boxes}"
        keep(record, case, boxes=boxes, scores=scores, labels=labels)
        for offset in (0, 1):
            for threshold in (0.3, 0.7):
                kept = nms(boxes, scores, threshold, offset=offset)[1]
                keep(record, case, **{f"nms_{offset}_{threshold}": kept.short()})
        for method in ("naive", "linear", "gaussian"):
            dets, kept = soft_nms(boxes, scores, 0.4, 0.5, 0.05, method)
            keep(record, case, **{f"soft_{method}": kept.short(), f"soft_scores_{method}": dets[:, 4]})
        groups = nms_match(torch.cat([boxes, scores[:, None]], 1), 0.5)
        keep(
            record,
            case,
            match=torch.cat(groups).short(),
            match_sizes=torch.tensor([len(g) for g in groups]).short(),
        )
        dets, kept = batched_nms(boxes, scores, labels, {"type": "nms", "iou_threshold": 0.5})
        keep(record, case, batched=kept.short())
        for mode in ("iou", "iof"):
            keep(record, case, **{mode: bbox_overlaps(boxes[:20], boxes[-20:], mode)})


def record_roi_align(record: Record, generator: torch.Generator) -> None:
    start = torch.rand(12, 2, generator=generator) * 80 - 10
    size = torch.rand(12, 2, generator=generator) * 90
    image = torch.randint(0, 2, (12, 1), generator=generator)
    rois = torch.cat([image, start, start + size], 1)
    maps = torch.randn(2, 3, 10, 12, generator=generator, requires_grad=True)
    grad = torch.randn(12, 3, 2, 3, generator=generator)
    keep(record, "roi_align", maps=maps, rois=rois, grad=grad)
    for mode in ("avg", "max"):
        for ratio in (0, 2):
            for aligned in (0, 1):
                pooled = roi_align(maps, rois, (2, 3), 0.125, ratio, mode, bool(aligned))
                by_maps = torch.autograd.grad(pooled, maps, grad)[0]
                name = f"{mode}_{ratio}_{aligned}"
                keep(record, "roi_align", **{name: pooled, f"{name}_grad": by_maps})


def record_deform_conv(record: Record, generator: torch.Generator) -> None:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_(True)

    for case, groups, deform_groups, stride in (("conv_plain", 1, 1, 1), ("conv_grouped", 2, 4, 2)):
        maps, weight, bias = normal(2, 8, 7, 6), normal(6, 8 // groups, 3, 3), normal(6)
        out_h, out_w = (7 - 1) // stride + 1, (6 - 1) // stride + 1
        offset, mask = normal(2, 18 * deform_groups, out_h, out_w), normal(2, 9 * deform_groups, out_h, out_w)
        grad = torch.randn(2, 6, out_h, out_w, generator=generator)
        keep(record, case, maps=maps, weight=weight, bias=bias, offset=offset, mask=mask, grad=grad)
        layout = (stride, 1, 1, groups, deform_groups)
        keep(record, case, layout=torch.tensor(layout))
        first = deform_conv2d(maps, offset, weight, *layout)
        keep(record, case, first=first)
        for i, by in enumerate(torch.autograd.grad(first, (maps, offset, weight), grad)):
            keep(record, case, **{f"first_grad{i}": by})
        second = modulated_deform_conv2d(maps, offset, mask, weight, bias, *layout)
        keep(record, case, second=second)
        for i, by in enumerate(torch.autograd.grad(second, (maps, offset, mask, weight, bias), grad)):
            keep(record, case, **{f"second_grad{i}": by})


def record_psa_mask(record: Record, generator: torch.Generator) -> None:
    masks = torch.randn(1, 15, 4, 5, generator=generator, requires_grad=True)
    grad = torch.randn(1, 20, 4, 5, generator=generator)
    keep(record, "psa", masks=masks, grad=grad)
    for kind in ("collect", "distribute"):
        out = PSAMask(kind, (3, 5))(masks)
        keep(record, "psa", **{kind: out, f"{kind}_grad": torch.autograd.grad(out, masks, grad)[0]})


def main(path: str) -> None:
    record: Record = {"versions": np.array([f"mmcv {mmcv.__version__}", f"torch {torch.__version__}"])}
    generator = torch.Generator().manual_seed(0)
    for part in (record_boxes, record_roi_align, record_deform_conv, record_psa_mask):
        part(record, generator)
    np.savez_compressed(path, **record)


if __name__ == "__main__":
    main(sys.argv[1])
