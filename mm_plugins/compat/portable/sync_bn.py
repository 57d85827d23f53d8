"""The steps of synchronised batch normalisation that lie between its all-reduces."""

# Shapes: N samples, C channels, S positions.
from torch import Tensor


def _wide(v_C: Tensor) -> Tensor:
    return v_C[:, None]


def channel_mean(x_NCS: Tensor) -> Tensor:
    """Mean of every channel over samples and positions, fp32."""
    return x_NCS.float().mean((0, 2))


def channel_variance(x_NCS: Tensor, mean_C: Tensor) -> Tensor:
    """Mean squared distance from a given mean (which may be that of all processes), fp32."""
    return (x_NCS.float() - _wide(mean_C)).square().mean((0, 2))


def normalise(x_NCS: Tensor, mean_C: Tensor, var_C: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """``(x - mean) / std`` in fp32, and ``std = sqrt(var + eps)``."""
    std_C = (var_C + eps).sqrt()
    return (x_NCS.float() - _wide(mean_C)) / _wide(std_C), std_C


def running_update(running_C: Tensor, value_C: Tensor, momentum: float | Tensor) -> Tensor:
    """Exponential mean: ``momentum * value + (1 - momentum) * running``."""
    return momentum * value_C + (1 - momentum) * running_C


def unbiased(var_C: Tensor, count: int) -> Tensor:
    """Variance times ``count / (count - 1)``; unchanged for a single value."""
    return var_C * count / (count - 1) if count > 1 else var_C


def parameter_grads(grad_NCS: Tensor, norm_NCS: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients by weight and bias: sums of ``grad * norm`` and of ``grad``, fp32."""
    grad_NCS = grad_NCS.float()
    return (grad_NCS * norm_NCS).sum((0, 2)), grad_NCS.sum((0, 2))


def input_grad(
    grad_NCS: Tensor,
    norm_NCS: Tensor,
    std_C: Tensor,
    weight_C: Tensor,
    grad_weight_C: Tensor,
    grad_bias_C: Tensor,
) -> Tensor:
    """Gradient by the input: ``w / std * (grad - (grad_w * norm + grad_b) / (N*S))``, fp32."""
    count = norm_NCS.shape[0] * norm_NCS.shape[2]
    centred = grad_NCS.float() - (_wide(grad_weight_C) * norm_NCS + _wide(grad_bias_C)) / count
    return _wide(weight_C / std_C) * centred
