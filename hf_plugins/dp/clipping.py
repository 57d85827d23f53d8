"""Per-unit clipping: norms, factors, and the clipped sum whose sensitivity is the clipping norm."""

# Shapes: B records of a chunk, U units (records, or users with several records), P parameters in one tensor,
# T tokens, I and O input and output features of a linear layer.

from collections.abc import Sequence

import torch
from torch import Tensor

# The norm of a float32 gradient is only known up to rounding; the factor is made smaller by more than that.
_ROUNDING = 1e-5


def unit_norms(gradients: Sequence[Tensor]) -> Tensor:
    """L2 norm of each unit's whole gradient, over all parameters together.

    ``norm_u = sqrt(sum over parameters of ||g_u||^2)``

    Args:
        gradients: One tensor for each parameter, ``[U, *shape]``, any float dtype.

    Returns:
        Norms ``[U]``, float64.

    Raises:
        ValueError: If there is no parameter at all.

    Source: Abadi et al. 2016, Algorithm 1 (norm clipping over the flat gradient).
    """
    if not gradients:
        raise ValueError("no parameter has a gradient of each record, so nothing can be clipped.")
    per_parameter = [
        torch.linalg.vector_norm(g.float().reshape(len(g), -1), dim=1).double() for g in gradients
    ]
    return torch.stack(per_parameter).square().sum(0).sqrt()


def clip_factors(norms_U: Tensor, max_grad_norm: float) -> Tensor:
    """What each unit's gradient is multiplied by: ``min(1, max_grad_norm / norm)``.

    A unit whose norm is not finite gets 0: it takes part with nothing, and the bound holds.

    Args:
        norms_U: L2 norms, >= 0.
        max_grad_norm: Clipping norm, > 0.

    Returns:
        Factors ``[U]`` in [0, 1], float64; exactly 1 where the norm lies at or below the bound.

    Source: Abadi et al. 2016, Algorithm 1, with the factor reduced by 1e-5 for rounding of the norm.
    """
    norms = norms_U.double()
    factors = torch.where(norms > max_grad_norm, (1 - _ROUNDING) * max_grad_norm / norms, 1.0)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(norms))


def clipped_sum(gradient_U: Tensor, factors_U: Tensor) -> Tensor:
    """Sum over units of factor times gradient; a unit with factor 0 counts as 0 even if it holds inf or NaN.

    Args:
        gradient_U: Gradients of one parameter, ``[U, *shape]``.
        factors_U: From `clip_factors`.

    Returns:
        Tensor of the parameter's shape, float32.
    """
    flat = gradient_U.float().reshape(len(gradient_U), -1)
    factors = factors_U.to(flat.dtype)
    if not bool((factors > 0).all()):
        flat = torch.where((factors > 0)[:, None], flat, torch.zeros_like(flat))
    return (factors @ flat).view(gradient_U.shape[1:])


def unit_means(gradient_B: Tensor, unit_B: Tensor, num_units: int) -> Tensor:
    """Average the gradients of the records of each unit.

    Args:
        gradient_B: Gradients of records, ``[B, *shape]``.
        unit_B: Index of the unit of each record, in ``0 .. num_units - 1``; each unit has a record.
        num_units: How many units the chunk holds.

    Returns:
        ``[U, *shape]``, float32.
    """
    total = torch.zeros(num_units, *gradient_B.shape[1:], device=gradient_B.device)
    total.index_add_(0, unit_B, gradient_B.float())
    count = torch.bincount(unit_B, minlength=num_units).clamp(min=1)
    return total / count.view(-1, *[1] * (gradient_B.dim() - 1))


def linear_norms(inputs_BTI: Tensor, output_gradients_BTO: Tensor) -> Tensor:
    """Norm of each record's weight gradient of a linear layer, without building the gradients if that is
    dearer.

    ``||sum_t o_t i_t^T||^2 = sum over t, s of (i_t . i_s) (o_t . o_s)``; the right side costs T^2 (I + O),
    the left one T I O, and the cheaper is taken.

    Args:
        inputs_BTI: Inputs of the layer; axes between the first and the last are taken together.
        output_gradients_BTO: Gradients of the loss by its outputs, same leading axes.

    Returns:
        Norms ``[B]``, float32 or wider.

    Source: Goodfellow 2015; Li et al. 2022 (ghost clipping); Bu et al. 2022 (the choice by cost).
    """
    x = inputs_BTI.reshape(inputs_BTI.shape[0], -1, inputs_BTI.shape[-1]).float()
    g = output_gradients_BTO.reshape(
        output_gradients_BTO.shape[0], -1, output_gradients_BTO.shape[-1]
    ).float()
    tokens, wide = x.shape[1], (x.shape[2], g.shape[2])
    if tokens * (wide[0] + wide[1]) < wide[0] * wide[1]:
        squares = (torch.bmm(x, x.mT) * torch.bmm(g, g.mT)).sum((1, 2))
        # Cancellation can leave a sum that is 0 in exact arithmetic a little below it.
        return squares.clamp(min=0).sqrt()
    return torch.bmm(g.mT, x).flatten(1).norm(dim=1)


def bias_norms(output_gradients_BTO: Tensor) -> Tensor:
    """Norm of each record's bias gradient of a linear layer: ``||sum_t o_t||``.

    Args:
        output_gradients_BTO: Gradients of the loss by the outputs.

    Returns:
        Norms ``[B]``, float32 or wider.
    """
    g = output_gradients_BTO.reshape(output_gradients_BTO.shape[0], -1, output_gradients_BTO.shape[-1])
    return g.float().sum(1).norm(dim=1)


def embedding_gradients(
    tokens_BT: Tensor, output_gradients_BTD: Tensor, *, rows: int, padding_idx: int | None
) -> Tensor:
    """Gradient of each record by the table of an embedding; the padding row learns nothing.

    Args:
        tokens_BT: Row numbers; axes after the first are taken together.
        output_gradients_BTD: Gradients of the loss by the looked-up rows.
        rows: Rows of the table.
        padding_idx: Row that PyTorch never trains, or None.

    Returns:
        ``[B, rows, D]`` in the dtype of the gradients.
    """
    batch, width = tokens_BT.shape[0], output_gradients_BTD.shape[-1]
    index = tokens_BT.reshape(batch, -1, 1).expand(-1, -1, width)
    table = output_gradients_BTD.new_zeros(batch, rows, width)
    table.scatter_add_(1, index, output_gradients_BTD.reshape(batch, -1, width))
    if padding_idx is not None:
        table[:, padding_idx] = 0
    return table


def embedding_norms(
    tokens_BT: Tensor, output_gradients_BTD: Tensor, *, rows: int, padding_idx: int | None
) -> Tensor:
    """Norm of each record's gradient by the table of an embedding, without building tables.

    Positions of a record with the same token add up first; then ``norm^2`` is the sum of squares over tokens.

    Args:
        tokens_BT: Row numbers; axes after the first are taken together.
        output_gradients_BTD: Gradients of the loss by the looked-up rows.
        rows: Rows of the table.
        padding_idx: Row that PyTorch never trains, or None.

    Returns:
        Norms ``[B]``, float32.

    Source: Kong and Munoz Medina 2023 (norms of sparse layers by unique pairs of record and row).
    """
    batch, width = tokens_BT.shape[0], output_gradients_BTD.shape[-1]
    tokens = tokens_BT.reshape(batch, -1)
    gradients = output_gradients_BTD.reshape(-1, width).float()
    if padding_idx is not None:
        gradients = gradients * (tokens.reshape(-1, 1) != padding_idx)
    records = torch.arange(batch, device=tokens.device)[:, None]
    pairs, place = torch.unique((tokens + records * rows).reshape(-1), return_inverse=True)
    sums = gradients.new_zeros(len(pairs), width).index_add_(0, place, gradients)
    squares = gradients.new_zeros(batch).index_add_(0, pairs // rows, sums.square().sum(1))
    return squares.sqrt()


def _only_kept(x_B: Tensor, factors_B: Tensor) -> Tensor:
    """The tensor in float32, records with factor 0 zeroed: they may hold inf or NaN."""
    x_B = x_B.float()
    if bool((factors_B > 0).all()):
        return x_B
    return torch.where((factors_B > 0).view(-1, *[1] * (x_B.dim() - 1)), x_B, torch.zeros_like(x_B))


def _scaled(x_B: Tensor, factors_B: Tensor) -> Tensor:
    return _only_kept(x_B, factors_B) * factors_B.float().view(-1, *[1] * (x_B.dim() - 1))


def linear_clipped_sum(inputs_BTI: Tensor, output_gradients_BTO: Tensor, factors_B: Tensor) -> Tensor:
    """Clipped sum of the weight gradients of a linear layer, from what it saw, in one product.

    Args:
        inputs_BTI: As in `linear_norms`.
        output_gradients_BTO: As in `linear_norms`.
        factors_B: From `clip_factors`.

    Returns:
        ``[O, I]``, float32.

    Source: Bu et al. 2023 (book-keeping: no second backward pass).
    """
    g = _scaled(output_gradients_BTO, factors_B).reshape(-1, output_gradients_BTO.shape[-1])
    return g.mT @ _only_kept(inputs_BTI, factors_B).reshape(-1, inputs_BTI.shape[-1])


def bias_clipped_sum(output_gradients_BTO: Tensor, factors_B: Tensor) -> Tensor:
    """Clipped sum of the bias gradients of a linear layer.

    Args:
        output_gradients_BTO: As in `bias_norms`.
        factors_B: From `clip_factors`.

    Returns:
        ``[O]``, float32.
    """
    return _scaled(output_gradients_BTO, factors_B).reshape(-1, output_gradients_BTO.shape[-1]).sum(0)


def embedding_clipped_sum(
    tokens_BT: Tensor,
    output_gradients_BTD: Tensor,
    factors_B: Tensor,
    *,
    rows: int,
    padding_idx: int | None,
) -> Tensor:
    """Clipped sum of the table gradients of an embedding.

    Args:
        tokens_BT: As in `embedding_norms`.
        output_gradients_BTD: As in `embedding_norms`.
        factors_B: From `clip_factors`.
        rows: Rows of the table.
        padding_idx: Row that PyTorch never trains, or None.

    Returns:
        ``[rows, D]``, float32.
    """
    g = _scaled(output_gradients_BTD, factors_B).reshape(-1, output_gradients_BTD.shape[-1])
    table = g.new_zeros(rows, g.shape[1]).index_add_(0, tokens_BT.reshape(-1), g)
    if padding_idx is not None:
        table[padding_idx] = 0
    return table
