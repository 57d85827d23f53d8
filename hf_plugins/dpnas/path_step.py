"""One step of DP-SGD on one path: per-sample gradients, clipped and summed, noised, divided by the expected
batch.
"""

# Shapes: N images of the batch (may be 0), K images of a chunk, C channels, H x W pixels.

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap


def clipped_gradient_sum(
    network: nn.Module, images_NCHW: Tensor, labels_N: Tensor, *, max_grad_norm: float, chunk_size: int = 64
) -> tuple[dict[str, Tensor], float]:
    """Sum over samples of ``g_n * min(1, C / ||g_n||)``, g_n being the gradient of one sample's cross
    entropy.

    Args:
        network: Model whose parameters are differentiated.
        images_NCHW: Batch; N = 0 is allowed and gives zeros.
        labels_N: Class numbers, int64.
        max_grad_norm: Bound C of the L2 norm over all parameters together, > 0.
        chunk_size: Samples whose gradients are held at once.

    Returns:
        Sums by parameter name, and the share of samples that were clipped (0 for an empty batch).

    Source: Abadi et al. 2016, Algorithm 1; DPNAS, arXiv 2110.08557, candidate training.
    """
    weights = {name: parameter.detach() for name, parameter in network.named_parameters()}

    def loss(weights: dict[str, Tensor], image_CHW: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(network, weights, (image_CHW.unsqueeze(0),))
        return nn.functional.cross_entropy(logits, label.unsqueeze(0))

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    num_clipped = 0
    for images_KCHW, labels_K in zip(images_NCHW.split(chunk_size), labels_N.split(chunk_size), strict=True):
        if not len(images_KCHW):
            continue
        grads = per_sample(weights, images_KCHW, labels_K)
        norm_K = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)
        scale_K = (max_grad_norm / norm_K.clamp_min(1e-12)).clamp(max=1.0)
        num_clipped += int((norm_K > max_grad_norm).sum())
        for name, g in grads.items():
            total[name] += torch.einsum("k,k...->...", scale_K, g)
    return total, num_clipped / max(len(images_NCHW), 1)


def noised_mean(
    total: dict[str, Tensor],
    *,
    noise_multiplier: float,
    max_grad_norm: float,
    expected_batch_size: float,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """``(sum + N(0, (noise_multiplier * max_grad_norm)^2)) / expected_batch_size`` for every parameter.

    The divisor is the expected batch size: under Poisson sampling the actual one is private.
    """
    std = noise_multiplier * max_grad_norm
    return {
        name: (value + std * torch.randn(value.shape, generator=generator, dtype=value.dtype))
        / expected_batch_size
        for name, value in total.items()
    }


def poisson_batch(num_records: int, sample_rate: float, generator: torch.Generator) -> Tensor:
    """Indices of one Poisson batch: every record with probability ``sample_rate``, independently; may be
    empty.
    """
    return (torch.rand(num_records, generator=generator) < sample_rate).nonzero().flatten()


@torch.no_grad()
def noisy_accuracy(
    network: nn.Module,
    images_NCHW: Tensor,
    labels_N: Tensor,
    *,
    expected_size: float,
    noise_multiplier: float,
    generator: torch.Generator,
    batch_size: int = 256,
) -> float:
    """Share of right answers from a noisy count, ``(#right + N(0, noise_multiplier^2)) / expected_size``.

    A count changes by at most 1 with one record, so this is the Gaussian mechanism with sensitivity 1; over
    a Poisson batch it is the sampled one. The result is not clamped, so that its mean is right: it may leave
    [0, 1].

    Args:
        network: Model to score.
        images_NCHW: Images; N = 0 is allowed.
        labels_N: Class numbers.
        expected_size: Divisor, the expected number of images (the actual one is private), > 0.
        noise_multiplier: Standard deviation of the noise on the count; 0 gives the plain share, not private.
        generator: Source of the noise.
        batch_size: Images run at once.
    """
    right = sum(
        int((network(images).argmax(1) == labels).sum())
        for images, labels in zip(images_NCHW.split(batch_size), labels_N.split(batch_size), strict=True)
        if len(images)
    )
    return (right + noise_multiplier * torch.randn((), generator=generator).item()) / expected_size
