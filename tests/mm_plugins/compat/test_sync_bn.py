"""The steps of synchronised batch normalisation, through mmcv's layer on one process."""

import pytest
import torch

import mm_plugins  # noqa: F401
from mm_plugins.compat.portable import sync_bn as core


def test_steps_by_hand() -> None:
    """Channel values 1, 3: mean 2, variance 1; with eps 3 the deviation is 2, the normalised values -+1/2."""
    x = torch.tensor([1.0, 3.0]).view(2, 1, 1)
    mean = core.channel_mean(x)
    variance = core.channel_variance(x, mean)
    norm, std = core.normalise(x, mean, variance, eps=3.0)
    assert (mean.item(), variance.item(), std.item()) == (2.0, 1.0, 2.0)
    assert norm.flatten().tolist() == [-0.5, 0.5]
    assert core.unbiased(variance, 2).item() == 2.0
    assert core.unbiased(variance, 1).item() == 1.0
    assert core.running_update(torch.tensor([10.0]), mean, 0.25).item() == 8.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_batch_norm(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process: mmcv's layer equals torch's in output, gradients and running statistics."""
    from mmcv.ops import sync_bn

    monkeypatch.setattr(sync_bn.dist, "get_world_size", lambda group=None: 1)
    layer = sync_bn.SyncBatchNorm(3, eps=1e-3, momentum=0.3, group=0, stats_mode="N")
    plain = torch.nn.BatchNorm2d(3, eps=1e-3, momentum=0.3)
    for norm in (layer, plain):
        norm.weight.data = torch.tensor([0.5, 1.0, 2.0])
        norm.bias.data = torch.tensor([0.1, -0.2, 0.3])
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 3, 4, 5, generator=generator) * 2 + 1).to(dtype)
    top = torch.randn(2, 3, 4, 5, generator=generator).to(dtype)
    first, second = x.clone().requires_grad_(True), x.float().requires_grad_(True)
    got, expected = layer(first), plain(second)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 5e-3, "rtol": 2e-3}
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, **tolerance)
    torch.testing.assert_close(layer.running_mean, plain.running_mean, **tolerance)
    torch.testing.assert_close(layer.running_var, plain.running_var, **tolerance)
    got.backward(top)
    expected.backward(top.float())
    torch.testing.assert_close(first.grad.float(), second.grad, **tolerance)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, **tolerance)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad, **tolerance)
