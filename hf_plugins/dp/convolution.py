"""Gradients of each record for two-dimensional convolutions, without unfolding the input."""

# Shapes: B records, I input channels, O output channels, H x W pixels in, P x Q pixels out, K x L kernel.

import torch
from torch import Tensor


def is_depthwise(in_channels: int, out_channels: int, groups: int) -> bool:
    """Whether every channel has its own kernel."""
    return groups == in_channels == out_channels


def depthwise_gradients(
    inputs_BIHW: Tensor,
    output_gradients_BIPQ: Tensor,
    *,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """Gradient of a depthwise kernel, record by record.

    The gradient of one channel's kernel is the correlation of its input with the gradient of its output; all
    B * I of them are one grouped convolution, in which stride and dilation change places.

    Args:
        inputs_BIHW: Input of the layer.
        output_gradients_BIPQ: Gradient of the loss with respect to its output.
        kernel_size: Kernel of the layer.
        stride: Stride of the layer.
        padding: Zeros around the input.
        dilation: Dilation of the layer.

    Returns:
        ``[B, I, 1, K, L]``, dtype of the inputs.

    Source: derivative of the convolution; compare Rochette et al. 2019, arXiv 1912.06015.
    """
    num_records, channels = inputs_BIHW.shape[:2]
    num_kernels = num_records * channels
    found = torch.nn.functional.conv2d(
        inputs_BIHW.reshape(1, num_kernels, *inputs_BIHW.shape[2:]),
        output_gradients_BIPQ.reshape(num_kernels, 1, *output_gradients_BIPQ.shape[2:]),
        stride=dilation,
        padding=padding,
        dilation=stride,
        groups=num_kernels,
    )
    # Where the stride does not divide the input, rows that no output saw are left over.
    return found[0, :, : kernel_size[0], : kernel_size[1]].reshape(num_records, channels, 1, *kernel_size)


def pointwise_gradients(inputs_BIHW: Tensor, output_gradients_BOHW: Tensor) -> Tensor:
    """Gradient of a 1x1 kernel with stride 1 and one group, record by record.

    Args:
        inputs_BIHW: Input of the layer.
        output_gradients_BOHW: Gradient of the loss with respect to its output.

    Returns:
        ``[B, O, I, 1, 1]``, dtype of the inputs.
    """
    found_BOI = torch.bmm(output_gradients_BOHW.flatten(2), inputs_BIHW.flatten(2).transpose(1, 2))
    return found_BOI[..., None, None]
