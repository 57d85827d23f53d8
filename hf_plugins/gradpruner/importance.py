"""How much a layer matters, read from the gradients of its LoRA factors.

One optimizer step of one linear module gives a "simulated gradient" of its weight as a product of two thin
matrices, ``left @ right``; everything below works on the thin ones and never forms the product whole.
"""

# Shapes: M output features, N input features, R rank (2R for first_order), T collected steps, L layers,
# B rows of one block.
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["product", "first_order", "exact"]
Score = Literal["squared", "fro"]
Normalize = Literal["none", "params"]
# Squared norms of one step: (layer, module name) -> value.
StepNorms = Mapping[tuple[int, str], float]


def simulated_gradient(
    a_RN: Tensor, b_MR: Tensor, grad_a_RN: Tensor, grad_b_MR: Tensor, *, estimator: Estimator = "product"
) -> tuple[Tensor, Tensor]:
    """Thin factors whose product stands for the gradient of the full weight at one step.

    ``product``: ``g_B @ g_A``. ``first_order``: ``g_B A + B g_A - g_B g_A``, written as
    ``[g_B, B] @ [A - g_A; g_A]``. ``exact`` takes its score from the true gradient elsewhere; the factors,
    which choose entries of a donor, are those of ``product``.

    Args:
        a_RN: LoRA factor A before the step, any float dtype.
        b_MR: LoRA factor B before the step.
        grad_a_RN: Its gradient as the optimizer will see it (averaged, clipped).
        grad_b_MR: Likewise for B.
        estimator: Which product.

    Returns:
        ``left`` (M, R or 2R) and ``right`` (R or 2R, N), fp32, detached from the inputs' storage.

    Source: GradPruner, arXiv 2601.19503, eq. 2 as its text and code mean it (B times A); first_order is
        LoRAPrune's.
    """
    a_RN, b_MR, grad_a_RN, grad_b_MR = (x.detach().float() for x in (a_RN, b_MR, grad_a_RN, grad_b_MR))
    if estimator == "first_order":
        return torch.cat([grad_b_MR, b_MR], dim=1), torch.cat([a_RN - grad_a_RN, grad_a_RN], dim=0)
    return grad_b_MR.clone(), grad_a_RN.clone()


def squared_norm(left_MR: Tensor, right_RN: Tensor) -> Tensor:
    """Squared Frobenius norm of ``left @ right`` from two R x R matrices, never from the M x N product.

    ``||left right||^2 = <left^T left, right right^T>``: R^2 (M + N) multiplications in place of R M N.

    Args:
        left_MR: First factor; the Gram matrices keep its dtype.
        right_RN: Second factor.

    Returns:
        Scalar, fp64; rounding can make a tiny value negative, which is cut to 0.
    """
    gram_left_RR = left_MR.T @ left_MR
    gram_right_RR = right_RN @ right_RN.T
    return (gram_left_RR.double() * gram_right_RR.double()).sum().clamp_min(0.0)


def importance_rows(left_TMR: Tensor, right_TRN: Tensor, start: int, stop: int) -> Tensor:
    """Rows of the IGIA matrix ``F = mean over steps of (left @ right)^2``, element by element.

    Args:
        left_TMR: First factors of all steps, fp32.
        right_TRN: Second factors.
        start: First row.
        stop: Row after the last.

    Returns:
        (stop - start, N), fp32, >= 0.

    Source: GradPruner, section on the IGIA matrix; mean over steps as in the text (the code sums, same
        ranking).
    """
    total_BN = torch.zeros(stop - start, right_TRN.shape[2], dtype=torch.float32)
    for left_MR, right_RN in zip(left_TMR, right_TRN, strict=True):
        product_BN = left_MR[start:stop] @ right_RN
        total_BN.addcmul_(product_BN, product_BN)
    return total_BN / len(left_TMR)


def step_scores(
    norms: Sequence[StepNorms],
    num_layers: int,
    *,
    score: Score = "squared",
    normalize: Normalize = "none",
    num_params: Mapping[tuple[int, str], int] | None = None,
) -> Tensor:
    """Score of every layer at every collected step.

    Args:
        norms: For each step the squared norms of all modules; the order of modules does not matter.
        num_layers: L, counting layers without any module.
        score: ``squared`` sums squared norms (paper), ``fro`` sums norms (the authors' code).
        normalize: ``params`` divides by the entries of the layer's scored modules; ``none`` does not (paper).
        num_params: Entries of each module, for ``normalize="params"``.

    Returns:
        (T, L) fp64, >= 0; layers without scored modules hold 0.

    Raises:
        ValueError: If ``normalize="params"`` comes without ``num_params``.
    """
    scores_TL = torch.zeros(len(norms), num_layers, dtype=torch.float64)
    for step, modules in enumerate(norms):
        # Sorted, so that rounding does not depend on the order in which modules were found.
        for layer, name in sorted(modules):
            value = modules[layer, name]
            scores_TL[step, layer] += value if score == "squared" else value**0.5
    if normalize == "params":
        if num_params is None:
            raise ValueError(
                "normalize='params' needs the size of each module; these scores were saved without it."
            )
        size_L = torch.zeros(num_layers, dtype=torch.float64)
        for (layer, _), count in num_params.items():
            size_L[layer] += count
        scores_TL /= size_L.clamp_min(1)
    return scores_TL


def layer_scores(scores_TL: Tensor) -> Tensor:
    """Mean over steps; the layers with the lowest values are dropped.

    Args:
        scores_TL: What `step_scores` gives.

    Returns:
        (L,) fp64.

    Raises:
        ValueError: If there is no step, or all scores are 0 or some are not finite.
    """
    if not len(scores_TL):
        raise ValueError(
            "no step was collected, so there are no layer scores. Train at least 3 optimizer steps."
        )
    if not torch.isfinite(scores_TL).all():
        raise ValueError("layer scores hold inf or NaN; lower the learning rate or score in bf16 or fp32.")
    if not scores_TL.any():
        raise ValueError(
            f"all {len(scores_TL)} collected steps have score 0: LoRA starts with B = 0, so the first step "
            "(and the second, if warm-up starts at learning rate 0) says nothing. Collect more steps: "
            "num_steps=40."
        )
    return scores_TL.mean(0)
