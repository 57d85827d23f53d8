"""Which functions answer for ``mmcv._ext``: C++ name to function, with the signature in mmcv 2.1.0.

A compiled ``mmcv._ext`` comes first (see ``standin.py``), then torchvision's ops where torchvision works,
then the portable ones.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mm_plugins.compat.portable import ext_signatures
from mm_plugins.compat.portable.deform_conv import deform_conv2d

OP_NAMES: tuple[str, ...] = (
    "bbox_overlaps",
    "border_align_backward",
    "border_align_forward",
    "carafe_backward",
    "carafe_forward",
    "carafe_naive_backward",
    "carafe_naive_forward",
    "deform_conv_backward_input",
    "deform_conv_backward_parameters",
    "deform_conv_forward",
    "deform_roi_pool_backward",
    "deform_roi_pool_forward",
    "get_compiler_version",
    "get_compiling_cuda_version",
    "masked_col2im_forward",
    "masked_im2col_forward",
    "modulated_deform_conv_backward",
    "modulated_deform_conv_forward",
    "ms_deform_attn_backward",
    "ms_deform_attn_forward",
    "nms",
    "nms_match",
    "psamask_backward",
    "psamask_forward",
    "roi_align_backward",
    "roi_align_forward",
    "roi_pool_backward",
    "roi_pool_forward",
    "sigmoid_focal_loss_backward",
    "sigmoid_focal_loss_forward",
    "softmax_focal_loss_backward",
    "softmax_focal_loss_forward",
    "softnms",
    "sync_bn_backward_data",
    "sync_bn_backward_param",
    "sync_bn_forward_mean",
    "sync_bn_forward_output",
    "sync_bn_forward_var",
)
"""Names of ``mmcv._ext`` that are served; every other one raises NotImplementedError when it is called."""


def _torchvision_takes(tensor: Tensor) -> bool:
    """Whether torchvision has a kernel for this tensor: any float on CUDA, no half on the CPU."""
    return tensor.is_cuda or tensor.dtype in (torch.float32, torch.float64)


def _torchvision_nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    if offset or boxes.dtype != scores.dtype or not _torchvision_takes(boxes):
        return ext_signatures.nms(boxes, scores, iou_threshold, offset)
    return torch.ops.torchvision.nms(boxes, scores, iou_threshold)


def _torchvision_roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    bins = (aligned_height, aligned_width)
    options = (spatial_scale, sampling_ratio, pool_mode, aligned)
    if not pool_mode or not _torchvision_takes(input):
        ext_signatures.roi_align_forward(input, rois, output, argmax_y, argmax_x, *bins, *options)
        return
    pooled = torch.ops.torchvision.roi_align(
        input, rois.to(input.dtype), spatial_scale, *bins, sampling_ratio, aligned
    )
    output.copy_(pooled)


def _torchvision_roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    bins = (aligned_height, aligned_width)
    options = (spatial_scale, sampling_ratio, pool_mode, aligned)
    if not pool_mode or not _torchvision_takes(grad_output):
        ext_signatures.roi_align_backward(grad_output, rois, argmax_y, argmax_x, grad_input, *bins, *options)
        return
    grad_input += torch.ops.torchvision._roi_align_backward(
        grad_output,
        rois.to(grad_output.dtype),
        spatial_scale,
        *bins,
        *grad_input.shape,
        sampling_ratio,
        aligned,
    )


def _torchvision_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    deform_groups: int,
) -> Tensor:
    if not _torchvision_takes(input):
        return deform_conv2d(
            input,
            offset,
            mask,
            weight,
            bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            deform_groups=deform_groups,
        )
    from torchvision.ops import deform_conv2d as convolve

    # torchvision reads both group counts off the shapes.
    return convolve(input, offset, weight, bias, stride, padding, dilation, mask)


def torchvision_ops() -> dict[str, Callable]:
    """Ops that an importable torchvision serves; none if it is absent, or built for another torch."""
    try:
        import torchvision.ops  # noqa: F401

        torch.ops.torchvision.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    except (ImportError, RuntimeError, AttributeError, OSError):
        return {}
    deform_conv = (name for name in OP_NAMES if "deform_conv" in name)
    return {
        "nms": _torchvision_nms,
        "roi_align_backward": _torchvision_roi_align_backward,
        "roi_align_forward": _torchvision_roi_align_forward,
        **{
            name: partial(getattr(ext_signatures, name), convolve=_torchvision_deform_conv2d)
            for name in deform_conv
        },
    }


_TORCHVISION_OPS = torchvision_ops()

PORTABLE_OPS: dict[str, Callable] = {
    **{name: getattr(ext_signatures, name) for name in OP_NAMES},
    **_TORCHVISION_OPS,
}
"""Functions that the stand-in answers with."""


def op_backends() -> dict[str, str]:
    """Which backend serves each op of the stand-in: "portable" or "torchvision"."""
    return {name: "torchvision" if name in _TORCHVISION_OPS else "portable" for name in OP_NAMES}
