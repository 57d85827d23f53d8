"""Focal losses on logits (sigmoid) and on probabilities (softmax), with their gradients."""

# Shapes: N samples, C classes.
import torch
from torch import Tensor

from mm_plugins.compat.portable.row_sums import compute_dtype

TINY = float(torch.finfo(torch.float32).tiny)
"""Floor inside the logarithms, the smallest normal fp32 number as in mmcv."""


def _class_weight(weight_C: Tensor | None, target_N: Tensor) -> Tensor:
    """Weight of every sample's class; 1 for the background (target C), which has none."""
    if weight_C is None:
        return torch.ones((), device=target_N.device).expand(len(target_N))
    known = (target_N >= 0) & (target_N < len(weight_C))
    return torch.where(known, weight_C[target_N.clamp(0, len(weight_C) - 1)], 1)


def _sigmoid_parts(logits_NC: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    logits_NC = logits_NC.to(compute_dtype(logits_NC.dtype))
    positive = target_N[:, None] == torch.arange(logits_NC.shape[1], device=target_N.device)
    return logits_NC.sigmoid(), positive


def sigmoid_focal_loss(
    logits_NC: Tensor,
    target_N: Tensor,
    weight_C: Tensor | None = None,
    *,
    gamma: float = 2.0,
    alpha: float = 0.25,
) -> Tensor:
    """Focal loss of every sample and class, with ``p = sigmoid(logit)``.

    ``-alpha (1-p)^gamma log p`` for the target class, ``-(1-alpha) p^gamma log(1-p)`` for the others.

    Args:
        logits_NC: Logits; half precision is computed in fp32.
        target_N: Class numbers; C means background, so that every class is a negative.
        weight_C: Factor of a sample by its target class, or None.
        gamma: Exponent that lowers the loss of easy samples.
        alpha: Balance of positives in [0, 1].

    Returns:
        Loss of shape (N, C) in the dtype of the logits.

    Source: Focal loss, arXiv 1708.02002, Eq. (5).
    """
    p, positive = _sigmoid_parts(logits_NC, target_N)
    loss_p = -alpha * (1 - p) ** gamma * p.clamp(min=TINY).log()
    loss_n = -(1 - alpha) * p**gamma * (1 - p).clamp(min=TINY).log()
    loss = torch.where(positive, loss_p, loss_n) * _class_weight(weight_C, target_N)[:, None]
    return loss.to(logits_NC.dtype)


def sigmoid_focal_loss_grad(
    logits_NC: Tensor,
    target_N: Tensor,
    weight_C: Tensor | None = None,
    *,
    gamma: float = 2.0,
    alpha: float = 0.25,
) -> Tensor:
    """Derivative of `sigmoid_focal_loss` by its logits, shape (N, C); arguments as there."""
    p, positive = _sigmoid_parts(logits_NC, target_N)
    q = 1 - p
    grad_p = -alpha * q**gamma * (q - gamma * p * p.clamp(min=TINY).log())
    grad_n = -(1 - alpha) * p**gamma * (gamma * q * q.clamp(min=TINY).log() - p)
    grad = torch.where(positive, grad_p, grad_n) * _class_weight(weight_C, target_N)[:, None]
    return grad.to(logits_NC.dtype)


def _target_probability(probs_NC: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """Probability of every sample's target, and whether it has one (target >= 0)."""
    probs_NC = probs_NC.to(compute_dtype(probs_NC.dtype))
    return probs_NC.gather(1, target_N.clamp(min=0)[:, None]).squeeze(1), target_N >= 0


def softmax_focal_loss(
    probs_NC: Tensor,
    target_N: Tensor,
    weight_C: Tensor | None = None,
    *,
    gamma: float = 2.0,
    alpha: float = 0.25,
) -> Tensor:
    """Focal loss ``-alpha (1-p)^gamma log p`` of every sample, p being the softmax probability of its target.

    Args:
        probs_NC: Probabilities (not logits) that sum to 1 over C.
        target_N: Class numbers; a negative one makes the loss 0.
        weight_C: Factor of a sample by its target class, or None.
        gamma: Exponent that lowers the loss of easy samples.
        alpha: Factor of the whole loss.

    Returns:
        Loss of shape (N,) in the dtype of the probabilities.
    """
    p_N, valid_N = _target_probability(probs_NC, target_N)
    loss_N = -alpha * (1 - p_N) ** gamma * p_N.clamp(min=TINY).log() * _class_weight(weight_C, target_N)
    return torch.where(valid_N, loss_N, 0).to(probs_NC.dtype)


def softmax_focal_loss_grad(
    probs_NC: Tensor,
    target_N: Tensor,
    weight_C: Tensor | None = None,
    *,
    gamma: float = 2.0,
    alpha: float = 0.25,
) -> tuple[Tensor, Tensor]:
    """Derivative of `softmax_focal_loss` by the logits behind the probabilities; arguments as there.

    Returns:
        ``p dL/dp`` of the target class, shape (N,), and the gradient of shape (N, C): that times (target -
        probability).
    """
    p_N, valid_N = _target_probability(probs_NC, target_N)
    q_N = 1 - p_N
    # q^(gamma-1) at q = 0 with gamma < 1 is infinite; the product with log(p) = 0 would be NaN.
    focus_N = gamma * torch.where(q_N > 0, q_N ** (gamma - 1), 0) * p_N * p_N.clamp(min=TINY).log()
    slope_N = alpha * (focus_N - q_N**gamma) * _class_weight(weight_C, target_N)
    slope_N = torch.where(valid_N, slope_N, 0)
    one_hot_NC = target_N[:, None] == torch.arange(probs_NC.shape[1], device=target_N.device)
    grad_NC = slope_N[:, None] * (one_hot_NC.to(slope_N.dtype) - probs_NC.to(slope_N.dtype))
    return slope_N.to(probs_NC.dtype), grad_NC.to(probs_NC.dtype)
