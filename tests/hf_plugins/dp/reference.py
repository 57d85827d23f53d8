"""Slow literal forms of what the room computes: loops over records, float64, no tricks."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def loop_clipped_sum(
    model: nn.Module, losses: Callable[[int], Tensor], num_records: int, max_grad_norm: float
) -> list[Tensor]:
    """One backward pass a record; clip the flat gradient; add."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    for number in range(num_records):
        gradients = torch.autograd.grad(losses(number), parameters, allow_unused=True)
        own = [
            torch.zeros_like(t) if g is None else g.double() for g, t in zip(gradients, total, strict=True)
        ]
        norm = math.sqrt(sum(float(g.square().sum()) for g in own))
        factor = min(1.0, max_grad_norm / norm) if norm > 0 else 1.0
        for sum_, gradient in zip(total, own, strict=True):
            sum_ += factor * gradient
    return total


def token_loss(logits: Tensor, labels: Tensor, *, shift: bool) -> float:
    """Mean cross entropy of one record, position by position."""
    losses = []
    for position in range(logits.shape[0]):
        target = position + 1 if shift else position
        if target >= logits.shape[0] or labels[target] == -100:
            continue
        scores = logits[position].double()
        losses.append(float(torch.logsumexp(scores, 0) - scores[labels[target]]))
    return sum(losses) / len(losses) if losses else 0.0


def binomial_tail(trials: int, probability: float, at_least: int) -> float:
    """P[Binomial >= at_least], by summing exact terms."""
    return sum(
        math.comb(trials, k) * probability**k * (1 - probability) ** (trials - k)
        for k in range(at_least, trials + 1)
    )


def audit_p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """The listing of Appendix D, with exact binomial terms."""
    q = 1 / (1 + math.exp(-epsilon))
    beta = binomial_tail(r, q, v)
    alpha = total = 0.0
    for i in range(1, v + 1):
        total += math.comb(r, v - i) * q ** (v - i) * (1 - q) ** (r - v + i)
        alpha = max(alpha, total / i)
    return min(1.0, beta + alpha * delta * 2 * m)


def users(column: Sequence[str]) -> dict[str, list[int]]:
    """Records of each user."""
    return {user: [i for i, other in enumerate(column) if other == user] for user in column}
