"""Per-record gradients of convolutions against one backward pass a record."""

import pytest
import torch
from torch import Tensor, nn

from hf_plugins.dp.convolution import depthwise_gradients, is_depthwise, pointwise_gradients


def one_by_one(layer: nn.Conv2d, inputs: Tensor, output_gradients: Tensor) -> Tensor:
    """A backward pass for each record alone."""
    found = []
    for x, g in zip(inputs, output_gradients, strict=True):
        found.append(torch.autograd.grad(layer(x[None]), layer.weight, g[None])[0])
    return torch.stack(found)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [(3, 1, 1, 1), (3, 2, 1, 1), (5, 1, 2, 1), (3, 1, 2, 2), (3, 2, 0, 1), ((3, 1), (1, 2), (1, 0), 1)],
)
@pytest.mark.parametrize("size", [(8, 8), (9, 7)])
def test_depthwise_equals_a_loop(
    kernel: object, stride: object, padding: object, dilation: int, size: tuple
) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(4, 4, kernel, stride, padding, dilation, groups=4, bias=False).double()
    x = torch.randn(3, 4, *size, generator=generator, dtype=torch.float64)
    g = torch.randn(layer(x).shape, generator=generator, dtype=torch.float64)
    found = depthwise_gradients(
        x,
        g,
        kernel_size=layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
    )
    torch.testing.assert_close(found, one_by_one(layer, x, g), atol=1e-12, rtol=1e-12)


def test_pointwise_equals_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(4, 6, 1, bias=False).double()
    x = torch.randn(3, 4, 5, 3, generator=generator, dtype=torch.float64)
    g = torch.randn(3, 6, 5, 3, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(pointwise_gradients(x, g), one_by_one(layer, x, g), atol=1e-12, rtol=1e-12)


def test_only_one_kernel_a_channel_is_depthwise() -> None:
    assert is_depthwise(8, 8, 8)
    assert not is_depthwise(8, 16, 8)
    assert not is_depthwise(8, 8, 4)
    assert not is_depthwise(8, 8, 1)
