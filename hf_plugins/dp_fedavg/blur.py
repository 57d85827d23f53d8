"""BLUR: bounded local update regularization, and the proximal term of FedProx beside it."""

# Lists of tensors are one vector each; with lead = 1 the first axis counts clients that train side by side.

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Hinge = Literal["square", "norm"]


def delta_norm(delta: Sequence[Tensor], *, lead: int = 0) -> Tensor:
    """L2 norm of the local update over all tensors together.

    Args:
        delta: Local minus global parameters, one tensor for each parameter.
        lead: 0, or 1 if the first axis counts clients.

    Returns:
        Scalar, or one norm for each client.
    """
    wide = [t if t.dtype == torch.float64 else t.float() for t in delta]
    squares = [tensor.square().flatten(lead).sum(-1) for tensor in wide]
    return torch.stack(squares).sum(0).sqrt()


def blur_penalty(
    delta: Sequence[Tensor], *, strength: float, clipping_norm: float, hinge: Hinge = "square"
) -> Tensor:
    """The term that BLUR adds to the local loss.

    ``square``: ``lambda/2 * max(0, ||delta||^2 - S^2)``; ``norm``: ``lambda/2 * max(0, ||delta|| - S)^2``.

    Args:
        delta: Local minus global parameters; gradients flow into it.
        strength: lambda, >= 0.
        clipping_norm: S, > 0.
        hinge: Which of the two.

    Returns:
        Scalar, 0 inside the ball.

    Source: CVPR 2022 paper as re-implemented in DP-FedPGN (``square``); ``norm`` is the other reading.
    """
    norm = delta_norm(delta)
    if hinge == "square":
        return strength / 2 * (norm.square() - clipping_norm**2).clamp(min=0)
    return strength / 2 * (norm - clipping_norm).clamp(min=0).square()


def blur_gradient(
    delta: Sequence[Tensor],
    *,
    strength: float,
    clipping_norm: float,
    hinge: Hinge = "square",
    lead: int = 0,
) -> list[Tensor]:
    """Gradient of `blur_penalty`: ``lambda * delta * 1[||delta|| > S]`` (``square``).

    ``norm`` gives ``lambda * delta * (1 - S / ||delta||)`` outside the ball.

    Args:
        delta: Local minus global parameters.
        strength: lambda, >= 0.
        clipping_norm: S, > 0.
        hinge: As in `blur_penalty`.
        lead: As in `delta_norm`.

    Returns:
        Tensors of the shapes of ``delta``; exactly 0 inside the ball and on its surface.
    """
    norm = delta_norm(delta, lead=lead)
    inside = norm <= clipping_norm
    scale = torch.full_like(norm, strength)
    if hinge == "norm":
        scale = strength * (1 - clipping_norm / norm.clamp(min=clipping_norm))
    scale = torch.where(inside, torch.zeros_like(scale), scale)
    return [tensor * scale.reshape(scale.shape + (1,) * (tensor.dim() - lead)) for tensor in delta]


def proximal_gradient(delta: Sequence[Tensor], *, strength: float) -> list[Tensor]:
    """Gradient of FedProx's term ``mu/2 * ||delta||^2``: it pulls back from the first step on, BLUR does not.

    Source: Li et al. 2020 (FedProx), Eq. (2).
    """
    return [tensor * strength for tensor in delta]
