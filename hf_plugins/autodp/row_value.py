"""Which rows help training most: LESS (influence by low-rank gradients) and DEITA (complexity, quality,
diversity), as functions of gradients, scores and embeddings.
"""

# n training rows, v validation rows, p parameters, k dimensions of the projection, d of embeddings.

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def adam_direction(
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> Tensor:
    """The step Adam would take for this gradient alone: ``m' / (sqrt(v') + eps)``.

    ``m' = beta1 m + (1 - beta1) g``, ``v' = beta2 v + (1 - beta2) g^2``; eps stands outside the root, as in
    the
    LESS paper (its code puts it inside).
    """
    m = beta1 * first + (1 - beta1) * gradient
    v = beta2 * second + (1 - beta2) * gradient.square()
    return m / (v.sqrt() + eps)


def jl_project(gradient_np: Tensor, k: int, *, seed: int, block: int = 4096) -> Tensor:
    """Random projection with entries +-1/sqrt(k), drawn block by block so that no p x k matrix is held.

    Inner products are kept up to about ``4 / sqrt(k)`` of the norms' product.

    Returns:
        (n, k) float32.
    """
    out = gradient_np.new_zeros(gradient_np.shape[0], k, dtype=torch.float32)
    for index, start in enumerate(range(0, gradient_np.shape[1], block)):
        part = gradient_np[:, start : start + block].float()
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        signs = torch.randint(0, 2, (part.shape[1], k), generator=generator, dtype=torch.int8)
        out += part @ (signs.float() * 2 - 1).to(part.device)
    return out / math.sqrt(k)


def less_scores(
    training: Sequence[Tensor],
    validation: Sequence[Tensor],
    rates: Sequence[float],
    *,
    tasks: Tensor | None = None,
) -> Tensor:
    """Influence of each training row: ``sum_c w_c mean_v cos(g_train, g_val)`` over checkpoints c.

    Args:
        training: A checkpoint each: (n, k) projected gradients, or Adam's directions.
        validation: The same checkpoints: (v, k).
        rates: Mean learning rate of each checkpoint; scaled to sum 1.
        tasks: (v,) sub-task of each validation row: the mean is taken inside one, the largest counts.

    Returns:
        (n,) float32 in [-1, 1].

    Raises:
        ValueError: If there is no checkpoint or the lists do not pair.
    """
    if not len(training) == len(validation) == len(rates) or not training:
        raise ValueError(
            "LESS needs gradients of train and validation rows and a rate for each checkpoint; got "
            f"{len(training)}, {len(validation)} and {len(rates)}."
        )
    total = sum(rates)
    groups = [torch.ones(len(validation[0]), dtype=torch.bool)]
    if tasks is not None:
        groups = [tasks == task for task in tasks.unique()]
    found = []
    for group in groups:
        score = torch.zeros(len(training[0]))
        for train_nk, val_vk, rate in zip(training, validation, rates, strict=True):
            target = torch.nn.functional.normalize(val_vk.float(), dim=1)[group].mean(0)
            score += rate / total * (torch.nn.functional.normalize(train_nk.float(), dim=1) @ target).cpu()
        found.append(score)
    return torch.stack(found).amax(0)


def keep_best(scores: Sequence[float], ratio: float) -> np.ndarray:
    """Numbers of the best ``round(ratio n)`` rows in their old order; ties go to the earlier row."""
    values = np.asarray(scores, float)
    count = math.floor(ratio * len(values) + 0.5)
    return np.sort(np.argsort(-values, kind="stable")[:count])


def deita_select(
    complexity: Sequence[float],
    quality: Sequence[float],
    x_nd: np.ndarray,
    count: int,
    *,
    max_cosine: float = 0.9,
) -> np.ndarray:
    """DEITA: by complexity x quality downwards, leaving out what is closer than ``max_cosine`` to a chosen
    row.

    Returns:
        At most ``count`` row numbers in the order chosen.
    """
    order = np.argsort(-np.asarray(complexity, float) * np.asarray(quality, float), kind="stable")
    norms = np.linalg.norm(x_nd, axis=1, keepdims=True)
    unit = x_nd / np.where(norms > 0, norms, 1)
    chosen: list[int] = []
    for row in order:
        if len(chosen) == count:
            break
        if not chosen or float((unit[chosen] @ unit[row]).max()) <= max_cosine:
            chosen.append(int(row))
    return np.array(chosen, int)
