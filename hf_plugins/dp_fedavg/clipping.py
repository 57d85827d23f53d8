"""Clipping of one user's whole update: the one place that the sensitivity of a round rests on."""

from collections.abc import Sequence

import torch
from torch import Tensor

# The factor is made smaller by more than float32 rounds, so that the bound holds for the numbers sent.
_ROUNDING = 1e-6


def update_norm(update: Sequence[Tensor]) -> float:
    """L2 norm over all tensors of an update together, as one vector.

    Args:
        update: Float tensors of any shape, 0-d and empty ones included.

    Returns:
        Norm >= 0 in float64; infinity or NaN if an entry is. Entries are scaled before they are squared, so
        values near the end of the range neither overflow nor vanish.
    """
    flat = [tensor.detach().double().reshape(-1) for tensor in update if tensor.numel()]
    if not flat:
        return 0.0
    largest = float(torch.stack([tensor.abs().max() for tensor in flat]).max())
    if largest == 0.0 or largest != largest or largest == float("inf"):
        return largest
    squares = sum(float((tensor / largest).square().sum()) for tensor in flat)
    return largest * squares**0.5


def clip_update(update: Sequence[Tensor], clipping_norm: float) -> tuple[list[Tensor], float]:
    """Scale one user's update into the ball of radius S: ``update * min(1, S / ||update||_2)``.

    The norm is over the concatenation of all tensors. Tensors of whole numbers or truth values are no update
    (a counter cannot carry noise): they come back as zeros and count nothing.

    Args:
        update: Tensors of any shape and dtype.
        clipping_norm: S, > 0; infinity clips nothing.

    Returns:
        The clipped tensors in float32, at most S long together, and the norm before, float64. An update that
        holds NaN or infinity comes back as zeros: it takes part with nothing.

    Raises:
        ValueError: If ``clipping_norm`` is not positive.

    Source: McMahan et al. 2018 (flat clipping of a user's update); CVPR 2022 paper, between LUS and noise.
    """
    if not clipping_norm > 0:
        raise ValueError(f"clipping_norm must be > 0; got {clipping_norm}. It bounds the norm of an update.")
    real = [tensor if tensor.is_floating_point() else torch.zeros_like(tensor) for tensor in update]
    norm = update_norm(real)
    if not norm < float("inf"):
        return [torch.zeros(tensor.shape, device=tensor.device) for tensor in update], norm
    if norm <= clipping_norm:
        return [tensor.detach().float() for tensor in real], norm
    factor = (1 - _ROUNDING) * clipping_norm / norm
    return [(tensor.detach().double() * factor).float() for tensor in real], norm
