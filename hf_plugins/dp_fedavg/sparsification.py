"""LUS, local update sparsification: drops the coordinates of an update that the local loss needs least."""

# Shapes: D numbers of an update.

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Score = Literal["utility", "magnitude", "random"]
Scope = Literal["tensor", "global"]


def utility_cost(update_D: Tensor, gradient_D: Tensor) -> Tensor:
    """What dropping each coordinate would cost the local loss, to first order: ``T = |g * delta|``.

    Args:
        update_D: Local minus global parameters.
        gradient_D: Gradient of the local loss without regularizer.

    Returns:
        Costs ``[D]``, float32, >= 0.

    Source: CVPR 2022 paper, as re-implemented in TrustFormer's DP-BLUR-LUS.
    """
    return (gradient_D.float() * update_D.float()).abs()


def largest(score_D: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` largest entries; among equal ones the lowest index wins.

    Args:
        score_D: Scores, finite.
        count: How many, in ``0 .. D``.

    Returns:
        bool ``[D]`` with exactly ``count`` True.
    """
    if count == 0:
        return torch.zeros_like(score_D, dtype=torch.bool)
    threshold = torch.kthvalue(score_D, score_D.numel() - count + 1).values
    mask = score_D > threshold
    equal = (score_D == threshold).nonzero().flatten()
    mask[equal[: count - int(mask.sum())]] = True
    return mask


def keep_mask(score_D: Tensor, keep_ratio: float, *, sizes: Sequence[int] | None = None) -> Tensor:
    """Mask of the share of coordinates with the largest scores, in each tensor or over all.

    Args:
        score_D: Scores.
        keep_ratio: Share kept, in (0, 1]; ``ceil(keep_ratio * n)`` of n.
        sizes: Lengths of the tensors that the vector is made of: each keeps its share. None: over all.

    Returns:
        bool ``[D]``.

    Raises:
        ValueError: If the share is out of range or the sizes do not add up.
    """
    if not 0 < keep_ratio <= 1:
        raise ValueError(
            f"keep_ratio must lie in (0, 1]; got {keep_ratio}. It is the share kept: 0.1 for 10 %."
        )
    sizes = [score_D.numel()] if sizes is None else list(sizes)
    if sum(sizes) != score_D.numel():
        raise ValueError(f"sizes must add up to the update's {score_D.numel()} numbers; got {sum(sizes)}.")
    if keep_ratio == 1:
        return torch.ones_like(score_D, dtype=torch.bool)
    # 0.3 * 10 is a little above 3 in floating point and must not keep 4.
    return torch.cat(
        [largest(part, math.ceil(keep_ratio * len(part) - 1e-9)) for part in score_D.split(sizes)]
    )


def kept_norms(update_D: Tensor, sparse_D: Tensor, sizes: Sequence[int]) -> list[float]:
    """What is left of each tensor, ``|mask * delta|^2 / |delta|^2``: its squared norm after LUS, over before.

    Args:
        update_D: Update before LUS.
        sparse_D: Update after it.
        sizes: Lengths of the tensors that the vector is made of.

    Returns:
        A share in [0, 1] for each tensor; 1 where there was nothing to lose.
    """
    before = [float(part.double().square().sum()) for part in update_D.split(list(sizes))]
    after = [float(part.double().square().sum()) for part in sparse_D.split(list(sizes))]
    return [a / b if b else 1.0 for a, b in zip(after, before, strict=True)]


def sparsify_update(
    update_D: Tensor,
    gradient_D: Tensor | None = None,
    *,
    keep_ratio: float,
    sizes: Sequence[int] | None = None,
    scope: Scope = "tensor",
    score: Score = "utility",
    generator: torch.Generator | None = None,
) -> Tensor:
    """LUS: the update with all but its most useful coordinates set to zero; nothing is scaled up for it.

    ``delta * 1[T_j among the keep_ratio largest]`` with ``T = |g * delta|``. It runs on the user's side
    before clipping, and the noise afterwards goes on every coordinate, so it changes no epsilon.

    Args:
        update_D: Local minus global parameters.
        gradient_D: Gradient of the local loss; needed by ``score="utility"``.
        keep_ratio: Share kept, in (0, 1].
        sizes: Lengths of the tensors of the vector; needed by ``scope="tensor"`` (None: one tensor).
        scope: Rank within each tensor, or over all coordinates.
        score: ``utility`` is LUS; ``magnitude`` and ``random`` are its controls.
        generator: Randomness of ``random``.

    Returns:
        The sparsified update, same shape and dtype.

    Raises:
        ValueError: If an option is unknown or out of range, or the gradient is missing, of another shape or
            not finite.

    Source: CVPR 2022 paper, local update sparsification; criterion as in `utility_cost`.
    """
    if score == "utility":
        if gradient_D is None or gradient_D.shape != update_D.shape:
            shape = None if gradient_D is None else tuple(gradient_D.shape)
            raise ValueError(
                f"score='utility' needs the local loss's gradient in the update's shape "
                f"{tuple(update_D.shape)}; got {shape}. Train with keep_gradient='last' or 'full'."
            )
        if not bool(torch.isfinite(gradient_D).all()):
            raise ValueError("the gradient for LUS is not finite; lower the local learning rate.")
        scores = utility_cost(update_D, gradient_D)
    elif score == "magnitude":
        scores = update_D.float().abs()
    elif score == "random":
        scores = torch.rand(update_D.shape, generator=generator)
    else:
        raise ValueError(f"score must be utility, magnitude or random; got {score!r}.")
    if scope not in ("tensor", "global"):
        raise ValueError(f"scope must be tensor or global; got {scope!r}.")
    mask = keep_mask(scores, keep_ratio, sizes=sizes if scope == "tensor" else None)
    return torch.where(mask, update_D, torch.zeros_like(update_D))
