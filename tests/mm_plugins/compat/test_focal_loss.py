"""Sigmoid and softmax focal losses with their gradients."""

import math

import pytest
import torch
from torch import Tensor

import mm_plugins  # noqa: F401
from mm_plugins.compat.portable import focal_loss as core
from tests.mm_plugins.compat import reference

LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
TARGET = torch.tensor([0, 3, 4, 1, 4, 2])
"""Class 4 is the background of four classes."""
WEIGHT = torch.tensor([0.5, 2.0, 1.5, 0.25], dtype=torch.float64)


def test_at_one_half_by_hand() -> None:
    """Logit 0: p = 1/2; the target pays alpha / 4 * log 2, the others (1 - alpha) / 4 * log 2 (gamma = 2)."""
    got = core.sigmoid_focal_loss(torch.zeros(1, 2), torch.tensor([1]))
    expected = torch.tensor([[0.75, 0.25]]) / 4 * math.log(2)
    torch.testing.assert_close(got, expected)


def test_sigmoid_equals_reference() -> None:
    got = core.sigmoid_focal_loss(LOGITS, TARGET, gamma=1.5, alpha=0.3)
    for (n, c), value in zip(
        ((n, c) for n in range(6) for c in range(4)), got.flatten().tolist(), strict=True
    ):
        expected = reference.sigmoid_focal(float(LOGITS[n, c]), int(TARGET[n]) == c, 1.5, 0.3)
        assert value == pytest.approx(expected, rel=1e-9)


def test_class_weight_multiplies_and_spares_the_background() -> None:
    plain = core.sigmoid_focal_loss(LOGITS, TARGET)
    weighted = core.sigmoid_focal_loss(LOGITS, TARGET, WEIGHT)
    factor = torch.tensor([0.5, 0.25, 1, 2.0, 1, 1.5], dtype=torch.float64)
    torch.testing.assert_close(weighted, plain * factor[:, None])
    grad = core.sigmoid_focal_loss_grad(LOGITS, TARGET, WEIGHT)
    torch.testing.assert_close(grad, core.sigmoid_focal_loss_grad(LOGITS, TARGET) * factor[:, None])


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_sigmoid_gradient_through_mmcv(gamma: float, weight: Tensor | None, reduction: str) -> None:
    from mmcv.ops import SigmoidFocalLoss

    loss = SigmoidFocalLoss(gamma, 0.3, weight, reduction)
    logits = LOGITS.clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: loss(x, TARGET), (logits,), fast_mode=True)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_softmax_value_and_gradient_through_mmcv(gamma: float, weight: Tensor | None, reduction: str) -> None:
    from mmcv.ops import SoftmaxFocalLoss

    target = TARGET.clamp(max=3)
    loss = SoftmaxFocalLoss(gamma, 0.3, weight, reduction)
    terms = [
        reference.softmax_focal(LOGITS[n].tolist(), int(t), gamma, 0.3)
        * (1 if weight is None else float(weight[t]))
        for n, t in enumerate(target)
    ]
    expected = sum(terms) / (len(terms) if reduction == "mean" else 1)
    assert float(loss(LOGITS, target)) == pytest.approx(expected, rel=1e-9)
    logits = LOGITS.clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: loss(x, target), (logits,), fast_mode=True)


def test_ignored_targets_cost_nothing() -> None:
    probs = LOGITS.softmax(1)
    target = torch.tensor([-1, 3, -1, 1, 0, 2])
    assert core.softmax_focal_loss(probs, target)[[0, 2]].tolist() == [0.0, 0.0]
    slope, grad = core.softmax_focal_loss_grad(probs, target)
    assert slope[[0, 2]].tolist() == [0.0, 0.0]
    assert torch.equal(grad[[0, 2]], torch.zeros(2, 4, dtype=torch.float64))
    assert float(grad[1].abs().sum()) > 0


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_certain_predictions_are_finite(gamma: float) -> None:
    """Logits of +-200: p is 0 or 1 in fp32; the floor inside the logarithm is the smallest normal number."""
    logits = torch.tensor([[200.0, -200.0]])
    wrong = core.sigmoid_focal_loss(logits, torch.tensor([1]), gamma=gamma, alpha=0.5)
    torch.testing.assert_close(wrong, torch.full((1, 2), -0.5 * math.log(torch.finfo(torch.float32).tiny)))
    assert torch.isfinite(core.sigmoid_focal_loss_grad(logits, torch.tensor([1]), gamma=gamma)).all()
    _, grad = core.softmax_focal_loss_grad(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), gamma=gamma)
    assert grad.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype) -> None:
    logits = LOGITS.to(dtype)
    for function in (core.sigmoid_focal_loss, core.sigmoid_focal_loss_grad):
        got = function(logits, TARGET)
        assert got.dtype == dtype
        assert torch.equal(got, function(logits.float(), TARGET).to(dtype))


def test_no_samples() -> None:
    from mmcv.ops import sigmoid_focal_loss

    logits = torch.zeros(0, 4, requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.zeros(0, dtype=torch.long), 2.0, 0.25, None, "sum")
    assert float(loss.detach()) == 0.0
