"""The portable ops against answers of a compiled mmcv 2.1.0, recorded by ``record_parity.py``."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import mm_plugins  # noqa: F401

RECORDED = np.load(Path(__file__).parents[2] / "data/mmcv_ops/mmcv_2.1.0_cpu.npz")
# Sums of up to a hundred fp32 products, added in another order.
TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}

pytestmark = pytest.mark.parity


def recorded(case: str, *names: str) -> list[Tensor]:
    return [torch.from_numpy(RECORDED[f"{case}/{name}"]) for name in names]


def leaves(case: str, *names: str) -> list[Tensor]:
    return [tensor.requires_grad_(True) for tensor in recorded(case, *names)]


def test_the_file_says_what_it_was_recorded_with() -> None:
    assert RECORDED["versions"][0] == "mmcv 2.1.0"


@pytest.mark.parametrize("case", ["boxes1", "boxes400"])
def test_boxes(case: str) -> None:
    from mmcv.ops import batched_nms, bbox_overlaps, nms, nms_match, soft_nms

    boxes, scores, labels = recorded(case, "boxes", "scores", "labels")
    for offset in (0, 1):
        for threshold in (0.3, 0.7):
            kept = nms(boxes, scores, threshold, offset=offset)[1]
            assert kept.tolist() == recorded(case, f"nms_{offset}_{threshold}")[0].tolist()
    for method in ("naive", "linear", "gaussian"):
        dets, kept = soft_nms(boxes, scores, 0.4, 0.5, 0.05, method)
        expected, expected_scores = recorded(case, f"soft_{method}", f"soft_scores_{method}")
        assert kept.tolist() == expected.tolist()
        torch.testing.assert_close(dets[:, 4], expected_scores)
    groups = nms_match(torch.cat([boxes, scores[:, None]], 1), 0.5)
    match, sizes = recorded(case, "match", "match_sizes")
    assert torch.cat(groups).tolist() == match.tolist()
    assert [len(g) for g in groups] == sizes.tolist()
    kept = batched_nms(boxes, scores, labels, {"type": "nms", "iou_threshold": 0.5})[1]
    assert kept.tolist() == recorded(case, "batched")[0].tolist()
    for mode in ("iou", "iof"):
        assert torch.equal(bbox_overlaps(boxes[:20], boxes[-20:], mode), recorded(case, mode)[0])


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("aligned", [0, 1])
def test_roi_align(mode: str, ratio: int, aligned: int) -> None:
    from mmcv.ops import roi_align

    (maps,) = leaves("roi_align", "maps")
    name = f"{mode}_{ratio}_{aligned}"
    rois, grad, expected, expected_grad = recorded("roi_align", "rois", "grad", name, f"{name}_grad")
    pooled = roi_align(maps, rois, (2, 3), 0.125, ratio, mode, bool(aligned))
    torch.testing.assert_close(pooled, expected, **TOLERANCE)
    torch.testing.assert_close(torch.autograd.grad(pooled, maps, grad)[0], expected_grad, **TOLERANCE)


@pytest.mark.parametrize("case", ["conv_plain", "conv_grouped"])
@pytest.mark.parametrize("version", ["first", "second"])
def test_deform_conv(case: str, version: str) -> None:
    from mmcv.ops import deform_conv2d, modulated_deform_conv2d

    layout = RECORDED[f"{case}/layout"].tolist()
    grad, expected = recorded(case, "grad", version)
    if version == "first":
        inputs = leaves(case, "maps", "offset", "weight")
        out = deform_conv2d(*inputs, *layout)
    else:
        inputs = leaves(case, "maps", "offset", "mask", "weight", "bias")
        out = modulated_deform_conv2d(*inputs, *layout)
    torch.testing.assert_close(out, expected, **TOLERANCE)
    for i, got in enumerate(torch.autograd.grad(out, inputs, grad)):
        torch.testing.assert_close(got, recorded(case, f"{version}_grad{i}")[0], **TOLERANCE)


@pytest.mark.parametrize("kind", ["collect", "distribute"])
def test_psa_mask(kind: str) -> None:
    from mmcv.ops import PSAMask

    (masks,) = leaves("psa", "masks")
    grad, expected, expected_grad = recorded("psa", "grad", kind, f"{kind}_grad")
    out = PSAMask(kind, (3, 5))(masks)
    assert torch.equal(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out, masks, grad)[0], expected_grad, **TOLERANCE)
