"""What a parrot minimises: the angle to the right embedding, or the chance that the hot map picks another."""

# Shapes: T tokens without padding, D width, V vocabulary.
from typing import Any

import torch
from torch import Tensor

_BLOCK_SCORES = 1 << 24


def cosine_loss(output_TD: Tensor, target_TD: Tensor) -> Tensor:
    """Mean of ``1 - cos(output, target)`` over tokens.

    Args:
        output_TD: What the parrot says (T, D); computed in fp32.
        target_TD: Input embeddings (T, D); no gradient flows into them.

    Returns:
        Scalar fp32 in [0, 2]: 0 when all point the same way, 1 when all are orthogonal.

    Source: Embed Parrot, arXiv 2405.11916.
    """
    return 1 - torch.cosine_similarity(output_TD.float(), target_TD.detach().float(), dim=-1).mean()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross entropy over ``tau * u E^T`` whose gradient is made with the value, block by block."""

    @staticmethod
    def forward(
        ctx: Any, unit_TD: Tensor, table_VD: Tensor, labels_T: Tensor, tau: float, block: int
    ) -> Tensor:
        total = unit_TD.new_zeros(())
        gradient_TD = torch.empty_like(unit_TD)
        for rows in torch.arange(len(unit_TD), device=unit_TD.device).split(block):
            logits = tau * unit_TD[rows] @ table_VD.T
            log_share = logits.log_softmax(1)
            picked = labels_T[rows][:, None]
            total = total - log_share.gather(1, picked).sum()
            share = log_share.exp_()
            share.scatter_add_(1, picked, share.new_full(picked.shape, -1.0))
            gradient_TD[rows] = share @ table_VD
        ctx.save_for_backward(gradient_TD)
        ctx.factor = tau / len(unit_TD)
        return total / len(unit_TD)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_TD,) = ctx.saved_tensors
        return grad[0] * ctx.factor * gradient_TD, None, None, None, None


def cosine_cross_entropy(
    output_TD: Tensor, unit_codebook_VD: Tensor, labels_T: Tensor, *, tau: float
) -> Tensor:
    """Cross entropy over ``tau * cos(output, E)``: it trains the argmax that HEI takes, which the angle alone
    does not.

    Blocks of tokens are scored and differentiated one after the other, so the T x V map is never stored.

    Args:
        output_TD: What the parrot says (T, D); computed in fp32.
        unit_codebook_VD: Input embeddings scaled to length 1 (V, D), fp32; they get no gradient.
        labels_T: Right tokens (T,), int64.
        tau: Inverse temperature, > 0.

    Returns:
        Scalar fp32 >= 0.

    Source: ours; the paper has the cosine alone.
    """
    x_TD = output_TD.float()
    unit_TD = x_TD / x_TD.norm(dim=1, keepdim=True).clamp_min(1e-12)
    block = max(1, _BLOCK_SCORES // len(unit_codebook_VD))
    return _ChunkedCrossEntropy.apply(unit_TD, unit_codebook_VD, labels_T, tau, block)  # type: ignore[no-untyped-call]
