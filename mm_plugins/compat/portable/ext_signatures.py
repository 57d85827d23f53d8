"""The functions of this package under the names and signatures of ``mmcv._ext`` 2.1.0.

Buffers are arguments and changed in place. Names of arguments are those of mmcv's bindings, because
``mmcv.ops`` passes most of them by keyword. Gradients are added to buffers that ``mmcv.ops`` allocates as
zeros.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mm_plugins.compat.portable import nms as nms_core
from mm_plugins.compat.portable.border_align import border_align, border_align_adjoint
from mm_plugins.compat.portable.boxes import bbox_overlaps as box_overlaps
from mm_plugins.compat.portable.carafe import carafe
from mm_plugins.compat.portable.deform_attn import ms_deform_attn
from mm_plugins.compat.portable.deform_conv import deform_conv2d, images_per_chunk, leading_entries
from mm_plugins.compat.portable.focal_loss import (
    sigmoid_focal_loss,
    sigmoid_focal_loss_grad,
    softmax_focal_loss,
    softmax_focal_loss_grad,
)
from mm_plugins.compat.portable.masked_conv import masked_columns, scatter_columns_
from mm_plugins.compat.portable.psa_mask import psa_mask, psa_mask_adjoint
from mm_plugins.compat.portable.roi_align import (
    add_roi_align_grad_,
    deform_roi_pool,
    roi_align,
    roi_align_max,
    roi_align_max_adjoint,
)
from mm_plugins.compat.portable.roi_pool import roi_pool, roi_pool_adjoint
from mm_plugins.compat.portable.sync_bn import (
    channel_mean,
    channel_variance,
    input_grad,
    normalise,
    parameter_grads,
    running_update,
    unbiased,
)

MAX_ATTENTION_ENTRIES = 1 << 22
"""Upper bound of the sampled pixels of one chunk of queries in deformable attention."""


@contextmanager
def _given_dtypes(tensor: Tensor) -> Iterator[None]:
    """Keep autocast from changing what the caller chose: ``mmcv.ops`` has cast the arguments."""
    with torch.autocast(tensor.device.type, enabled=False):
        yield


def _recomputed_grads(
    function: Callable[..., Tensor], inputs: list[Tensor], grad_output: Tensor
) -> tuple[Tensor | None, ...]:
    """Run the function again with gradients and pull ``grad_output`` back to its inputs."""
    with torch.enable_grad(), _given_dtypes(grad_output):
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves), leaves, grad_output, allow_unused=True)


def _optional(tensor: Tensor) -> Tensor | None:
    """None for the empty tensor by which ``mmcv.ops`` says "not given"."""
    return tensor if tensor.numel() else None


# Boxes


def bbox_overlaps(
    bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int
) -> None:
    """IoU (mode 0) or IoF (mode 1) into ``ious``."""
    ious.copy_(box_overlaps(bboxes1, bboxes2, mode="iof" if mode else "iou", aligned=aligned, offset=offset))


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Kept indices in order of falling score."""
    return nms_core.nms(boxes, scores, iou_threshold=iou_threshold, offset=offset)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Kept indices; boxes and lowered scores go to the first rows of ``dets``."""
    kept, index = nms_core.soft_nms(
        boxes,
        scores,
        iou_threshold=iou_threshold,
        sigma=sigma,
        min_score=min_score,
        method=method,
        offset=offset,
    )
    dets[: len(kept)] = kept
    return index


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Groups of indices, the kept one first."""
    return nms_core.nms_match(dets, iou_threshold=iou_threshold)


# Regions of interest


def roi_align_forward(
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
    """Pool into ``output``: maxima (mode 0, with their places) or means (mode 1)."""
    options = {
        "output_size": (aligned_height, aligned_width),
        "spatial_scale": spatial_scale,
        "sampling_ratio": sampling_ratio,
        "aligned": aligned,
    }
    if pool_mode:
        output.copy_(roi_align(input, rois, **options))
        return
    pooled = roi_align_max(input, rois, **options)
    output.copy_(pooled.value)
    argmax_y.copy_(pooled.y)
    argmax_x.copy_(pooled.x)


def roi_align_backward(
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
    """Add the gradient by the input to ``grad_input``."""
    if pool_mode:
        add_roi_align_grad_(
            grad_input,
            grad_output,
            rois,
            spatial_scale=spatial_scale,
            sampling_ratio=sampling_ratio,
            aligned=aligned,
        )
    else:
        shape = tuple(grad_input.shape)
        grad_input += roi_align_max_adjoint(grad_output, rois, argmax_y, argmax_x, input_shape=shape)


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Maxima into ``output`` and their pixels into ``argmax``."""
    value, place = roi_pool(
        input, rois, output_size=(pooled_height, pooled_width), spatial_scale=spatial_scale
    )
    output.copy_(value)
    argmax.copy_(place)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Add the gradient by the input to ``grad_input``."""
    grad_input += roi_pool_adjoint(grad_output, rois, argmax, input_shape=tuple(grad_input.shape))


def deform_roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Means of displaced bins into ``output``; an empty ``offset`` stands for none."""
    pooled = deform_roi_pool(
        input,
        rois,
        _optional(offset),
        output_size=(pooled_height, pooled_width),
        spatial_scale=spatial_scale,
        sampling_ratio=sampling_ratio,
        gamma=gamma,
    )
    output.copy_(pooled)


def deform_roi_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Add the gradients by input and offset to their buffers."""

    def pooled(x: Tensor, shift: Tensor | None = None) -> Tensor:
        return deform_roi_pool(
            x,
            rois,
            shift,
            output_size=(pooled_height, pooled_width),
            spatial_scale=spatial_scale,
            sampling_ratio=sampling_ratio,
            gamma=gamma,
        )

    inputs = [input] if _optional(offset) is None else [input, offset]
    for buffer, grad in zip(
        (grad_input, grad_offset), _recomputed_grads(pooled, inputs, grad_output), strict=False
    ):
        if grad is not None:
            buffer += grad


def border_align_forward(
    input: Tensor, boxes: Tensor, output: Tensor, argmax_idx: Tensor, pool_size: int
) -> None:
    """Maxima along the sides into ``output``, their sample numbers into ``argmax_idx``."""
    value, place = border_align(input, boxes, pool_size=pool_size)
    output.copy_(value)
    argmax_idx.copy_(place)


def border_align_backward(
    grad_output: Tensor, boxes: Tensor, argmax_idx: Tensor, grad_input: Tensor, pool_size: int
) -> None:
    """Add the gradient by the input to ``grad_input``."""
    shape = tuple(grad_input.shape)
    grad_input += border_align_adjoint(grad_output, boxes, argmax_idx, input_shape=shape, pool_size=pool_size)


# Deformable convolution and attention


def _chunks(offset: Tensor, num_taps: int, channels: int) -> Iterator[slice]:
    """Slices of the images whose sampled values fit the bound at once."""
    step = images_per_chunk(offset.shape[2] * offset.shape[3], num_taps, channels)
    return (slice(start, start + step) for start in range(0, len(offset), step))


def _add_grads(
    function: Callable[..., Tensor],
    by_image: list[tuple[Tensor, Tensor]],
    shared: list[tuple[Tensor, Tensor]],
    grad_output: Tensor,
    chunks: Iterator[slice],
) -> None:
    """Add gradients to (input, buffer) pairs, chunk by chunk of images; shared inputs have no image axis."""
    for chunk in chunks:
        inputs = [x[chunk] for x, _ in by_image] + [x for x, _ in shared]
        buffers = [b[chunk] for _, b in by_image] + [b for _, b in shared]
        grads = _recomputed_grads(function, inputs, grad_output[chunk])
        for buffer, grad in zip(buffers, grads, strict=True):
            buffer += grad


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
    *,
    convolve: Callable[..., Tensor] = deform_conv2d,
) -> None:
    """Version 1 into ``output``; work buffers and ``im2col_step`` are not used."""
    for chunk in _chunks(offset, kH * kW, input.shape[1]):
        with _given_dtypes(input):
            output[chunk] = convolve(
                input[chunk],
                offset[chunk],
                None,
                weight,
                stride=(dH, dW),
                padding=(padH, padW),
                dilation=(dilationH, dilationW),
                groups=group,
                deform_groups=deformable_group,
            )


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
    *,
    convolve: Callable[..., Tensor] = deform_conv2d,
) -> None:
    """Add the gradients by input and offset to their buffers."""

    def conv(x: Tensor, shift: Tensor) -> Tensor:
        return convolve(
            x,
            shift,
            None,
            weight,
            stride=(dH, dW),
            padding=(padH, padW),
            dilation=(dilationH, dilationW),
            groups=group,
            deform_groups=deformable_group,
        )

    pairs = [(input, gradInput), (offset, gradOffset)]
    _add_grads(conv, pairs, [], gradOutput, _chunks(offset, kH * kW, input.shape[1]))


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
    *,
    convolve: Callable[..., Tensor] = deform_conv2d,
) -> None:
    """Add ``scale`` times the gradient by the weight to ``gradWeight``."""
    # The convolution is linear in its weight, so the gradient buffer, zeros or not, can stand in for it.
    for chunk in _chunks(offset, kH * kW, input.shape[1]):

        def conv(kernel: Tensor, chunk: slice = chunk) -> Tensor:
            return convolve(
                input[chunk],
                offset[chunk],
                None,
                kernel,
                stride=(dH, dW),
                padding=(padH, padW),
                dilation=(dilationH, dilationW),
                groups=group,
                deform_groups=deformable_group,
            )

        gradWeight += scale * _recomputed_grads(conv, [gradWeight], gradOutput[chunk])[0]


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
    *,
    convolve: Callable[..., Tensor] = deform_conv2d,
) -> None:
    """Version 2 into ``output``; work buffers are not used."""
    out_size = (output.shape[2], output.shape[3])
    for chunk in _chunks(offset, kernel_h * kernel_w, input.shape[1]):
        with _given_dtypes(input):
            output[chunk] = convolve(
                input[chunk],
                leading_entries(offset[chunk], out_size),
                leading_entries(mask[chunk], out_size),
                weight,
                bias if with_bias else None,
                stride=(stride_h, stride_w),
                padding=(pad_h, pad_w),
                dilation=(dilation_h, dilation_w),
                groups=group,
                deform_groups=deformable_group,
            )


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
    *,
    convolve: Callable[..., Tensor] = deform_conv2d,
) -> None:
    """Add the gradients by input, offset, mask, weight and bias to their buffers."""

    out_size = (grad_output.shape[2], grad_output.shape[3])

    def conv(x: Tensor, shift: Tensor, factor: Tensor, kernel: Tensor) -> Tensor:
        return convolve(
            x,
            leading_entries(shift, out_size),
            leading_entries(factor, out_size),
            kernel,
            stride=(stride_h, stride_w),
            padding=(pad_h, pad_w),
            dilation=(dilation_h, dilation_w),
            groups=group,
            deform_groups=deformable_group,
        )

    pairs = [(input, grad_input), (offset, grad_offset), (mask, grad_mask)]
    chunks = _chunks(offset, kernel_h * kernel_w, input.shape[1])
    _add_grads(conv, pairs, [(weight, grad_weight)], grad_output, chunks)
    if with_bias:
        grad_bias += grad_output.sum((0, 2, 3))


def _query_chunks(locations: Tensor) -> Iterator[slice]:
    """Slices of the queries whose sampled pixels fit the bound at once."""
    num_images, num_queries, num_heads, num_levels, num_points, _ = locations.shape
    step = max(1, MAX_ATTENTION_ENTRIES // max(1, num_images * num_heads * num_levels * num_points * 4))
    return (slice(start, start + step) for start in range(0, num_queries, step))


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Attended values of shape (images, queries, heads * channels)."""
    output = value.new_zeros(value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3])
    for chunk in _query_chunks(sampling_locations):
        output[:, chunk] = ms_deform_attn(
            value,
            value_spatial_shapes,
            value_level_start_index,
            sampling_locations[:, chunk],
            attention_weights[:, chunk],
        )
    return output


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Add the gradients by values, locations and weights to their buffers."""

    def attended(v: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn(v, value_spatial_shapes, value_level_start_index, locations, weights)

    for chunk in _query_chunks(sampling_locations):
        inputs = [value, sampling_locations[:, chunk], attention_weights[:, chunk]]
        by_value, by_location, by_weight = _recomputed_grads(attended, inputs, grad_output[:, chunk])
        grad_value += by_value
        grad_sampling_loc[:, chunk] += by_location
        grad_attn_weight[:, chunk] += by_weight


# Losses


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Loss of every sample and class into ``output``; an empty ``weight`` stands for none."""
    output.copy_(sigmoid_focal_loss(input, target, _optional(weight), gamma=gamma, alpha=alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Derivative by the logits into ``grad_input``."""
    grad_input.copy_(sigmoid_focal_loss_grad(input, target, _optional(weight), gamma=gamma, alpha=alpha))


def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Loss of every sample into ``output``; ``input`` holds probabilities."""
    output.copy_(softmax_focal_loss(input, target, _optional(weight), gamma=gamma, alpha=alpha))


def softmax_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    buff: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Derivative by the logits into ``grad_input``; ``p dL/dp`` into ``buff``."""
    slope, grad = softmax_focal_loss_grad(input, target, _optional(weight), gamma=gamma, alpha=alpha)
    buff.copy_(slope)
    grad_input.copy_(grad)


# Upsampling and attention masks


def carafe_naive_forward(
    features: Tensor, masks: Tensor, output: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> None:
    """Upsampled map into ``output``."""
    output.copy_(
        carafe(features, masks, kernel_size=kernel_size, group_size=group_size, scale_factor=scale_factor)
    )


def carafe_naive_backward(
    top_grad: Tensor,
    features: Tensor,
    masks: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Add the gradients by features and masks to ``bottom_grad`` and ``mask_grad``."""

    def upsampled(x: Tensor, kernels: Tensor) -> Tensor:
        return carafe(x, kernels, kernel_size=kernel_size, group_size=group_size, scale_factor=scale_factor)

    by_features, by_masks = _recomputed_grads(upsampled, [features, masks], top_grad)
    bottom_grad += by_features
    mask_grad += by_masks


def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Upsampled map into ``output``, and the features into ``rfeatures``, which the backward call gets."""
    rfeatures.copy_(features)
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)


def carafe_backward(
    top_grad: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rtop_grad: Tensor,
    rbottom_grad_hs: Tensor,
    rbottom_grad: Tensor,
    rmask_grad: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """As `carafe_naive_backward`, with the features from ``rfeatures``; work buffers are not used."""
    carafe_naive_backward(
        top_grad, rfeatures, masks, bottom_grad, mask_grad, kernel_size, group_size, scale_factor
    )


def psamask_forward(
    input: Tensor,
    output: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Attention of all pairs of pixels into ``output``: type 0 collects, 1 distributes."""
    output.copy_(psa_mask(input, mask_size=(h_mask, w_mask), distribute=bool(psa_type)))


def psamask_backward(
    grad_output: Tensor,
    grad_input: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Add the gradient by the mask to ``grad_input``."""
    grad_input += psa_mask_adjoint(grad_output, mask_size=(h_mask, w_mask), distribute=bool(psa_type))


# Masked convolution


def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Columns of the chosen positions of the single image into ``col``."""
    size, padding = (kernel_h, kernel_w), (pad_h, pad_w)
    col.copy_(masked_columns(im[0], mask_h_idx, mask_w_idx, kernel_size=size, padding=padding))


def masked_col2im_forward(
    col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, im: Tensor, height: int, width: int, channels: int
) -> None:
    """Values of the chosen positions into the single image ``im``."""
    scatter_columns_(im.view(channels, height, width), col, mask_h_idx, mask_w_idx)


# Synchronised batch normalisation


def sync_bn_forward_mean(input: Tensor, mean: Tensor) -> None:
    """Means of the channels into ``mean``."""
    mean.copy_(channel_mean(input))


def sync_bn_forward_var(input: Tensor, mean: Tensor, var: Tensor) -> None:
    """Variances around the given mean into ``var``."""
    var.copy_(channel_variance(input, mean))


def sync_bn_forward_output(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    norm: Tensor,
    std: Tensor,
    output: Tensor,
    eps: float,
    momentum: float | Tensor,
    group_size: int,
) -> None:
    """Fill ``norm``, ``output`` and ``std`` (deviations), and update the running statistics."""
    normalised, deviation = normalise(input, mean, var, eps=eps)
    norm.copy_(normalised)
    std.copy_(deviation)
    output.copy_(normalised * weight.view(-1, 1) + bias.view(-1, 1))
    count = input.shape[0] * input.shape[2] * group_size
    running_mean.copy_(running_update(running_mean, mean, momentum))
    running_var.copy_(running_update(running_var, unbiased(var, count), momentum))


def sync_bn_backward_param(grad_output: Tensor, norm: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> None:
    """Gradients by weight and bias into their buffers."""
    by_weight, by_bias = parameter_grads(grad_output, norm)
    grad_weight.copy_(by_weight)
    grad_bias.copy_(by_bias)


def sync_bn_backward_data(
    grad_output: Tensor,
    weight: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    norm: Tensor,
    std: Tensor,
    grad_input: Tensor,
) -> None:
    """Gradient by the input into ``grad_input``."""
    grad_input.copy_(input_grad(grad_output, norm, std, weight, grad_weight, grad_bias))


# Information


def get_compiler_version() -> str:
    """What mmengine prints as "MMCV Compiler"."""
    return "none (portable ops of mm_plugins.compat)"


def get_compiling_cuda_version() -> str:
    """What mmengine prints as "MMCV CUDA Compiler"."""
    return "not available"
