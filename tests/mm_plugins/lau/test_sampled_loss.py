"""The fused loss equals enlarging first and taking the loss then."""

import pytest
import torch

from mm_plugins.lau.location_loss import pixel_loss
from mm_plugins.lau.sampled_loss import sampled_cross_entropy
from mm_plugins.lau.sampling import location_aware_upsample


def problem(classes: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, classes, 5, 6, generator=generator, dtype=torch.float64).to(dtype)
    offset = torch.randn(2, 2, 5 * k, 6 * k, generator=generator, dtype=torch.float64).to(dtype)
    label = torch.randint(max(classes, 2), (2, 5 * k, 6 * k), generator=generator)
    label[1, 2:5, 3:] = 255
    return x.requires_grad_(), offset.requires_grad_(), label


@pytest.mark.parametrize("base_grid", ["asymmetric", "half_pixel"])
@pytest.mark.parametrize(
    ("classes", "k", "dtype", "atol"),
    [(5, 3, torch.float64, 1e-12), (1, 3, torch.float64, 1e-12), (300, 16, torch.float32, 1e-4)],
)
def test_equals_the_two_steps(classes: int, k: int, dtype: torch.dtype, atol: float, base_grid: str) -> None:
    """300 classes at k = 16 make more than one piece of each image."""
    x, offset, label = problem(classes, k, dtype)
    enlarged = location_aware_upsample(x, offset, scale_factor=k, base_grid=base_grid)
    wanted = pixel_loss(enlarged, label)
    found, right = sampled_cross_entropy(x, offset, label, scale=(k, k), base_grid=base_grid)
    torch.testing.assert_close(found, wanted, atol=atol, rtol=0)
    weight = torch.linspace(0.5, 2, label.numel(), dtype=dtype).view(label.shape)
    ours = torch.autograd.grad((found * weight).sum(), (x, offset))
    theirs = torch.autograd.grad((wanted * weight).sum(), (x, offset))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=atol * 10, rtol=1e-4)
    best = enlarged.argmax(1) if classes > 1 else (enlarged[:, 0] > 0).long()
    assert torch.equal(right, best == label)
    assert not right[label == 255].any()


def test_ignored_pixels_give_no_gradient_and_nothing_labelled_gives_zero() -> None:
    x, offset, label = problem(4, 2, torch.float64)
    loss, _ = sampled_cross_entropy(x, offset, label, scale=(2, 2))
    (d_offset,) = torch.autograd.grad(loss.sum(), offset)
    assert (d_offset.transpose(0, 1)[:, label == 255] == 0).all()
    loss, _ = sampled_cross_entropy(x, offset, torch.full_like(label, 255), scale=(2, 2))
    assert loss.sum().item() == 0
    assert (torch.autograd.grad(loss.sum(), x)[0] == 0).all()


def test_large_logits_do_not_overflow() -> None:
    """Logits of 1e4: the sum of exponentials is shifted by the largest, and the loss is exact to fp32."""
    x, offset, label = problem(5, 2, torch.float32)
    found, _ = sampled_cross_entropy(1e4 * x, offset, label, scale=(2, 2))
    wanted = pixel_loss(location_aware_upsample(1e4 * x, offset, scale_factor=2), label)
    torch.testing.assert_close(found, wanted, atol=1e-2, rtol=1e-5)
    assert found.max() > 1e4


def test_keeps_nothing_of_the_outputs_size() -> None:
    x, offset, label = problem(40, 4, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        sampled_cross_entropy(x, offset, label, scale=(4, 4))
    assert sum(kept) == x.numel() + offset.numel() + 2 * label.numel()


def test_bad_shapes_and_backend() -> None:
    x, offset, label = problem(4, 2, torch.float32)
    with pytest.raises(ValueError, match="the sampled loss needs offsets"):
        sampled_cross_entropy(x, offset, label[:, :-1], scale=(2, 2))
    with pytest.raises(
        ValueError, match="must be one of auto, rows, triton; got 'grid_sample'. F.grid_sample"
    ):
        sampled_cross_entropy(x, offset, label, scale=(2, 2), backend="grid_sample")
