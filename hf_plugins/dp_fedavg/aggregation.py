"""The server's side of a round: running sum, fixed denominator, a clipping norm that follows the norms."""

# Shapes: D numbers of an update.

import math

import torch
from torch import Tensor


class RunningSum:
    """Sum of clipped updates in float64, one at a time; users' sample counts never enter.

    Args:
        size: Numbers of an update.
    """

    def __init__(self, size: int) -> None:
        self.sum_D = torch.zeros(size, dtype=torch.float64)
        self.count = 0

    def add(self, update_D: Tensor) -> None:
        """Add one user's clipped update."""
        self.sum_D.add_(update_D)
        self.count += 1


def private_step(sum_D: Tensor, noise_D: Tensor, *, expected_users: float, server_lr: float) -> Tensor:
    """Step of the global model: ``eta_g * (sum + noise) / m``.

    Args:
        sum_D: Sum of clipped updates, float64.
        noise_D: Noise of the sum.
        expected_users: m = q K, fixed before the round: under Poisson sampling the number of users who came
            is private, and weights by sample count would raise the sensitivity.
        server_lr: eta_g, > 0.

    Returns:
        float32 ``[D]``.

    Raises:
        ValueError: If ``expected_users`` is not positive.

    Source: McMahan et al. 2018, fixed-denominator estimator; CVPR 2022 paper, server step.
    """
    if not expected_users > 0:
        raise ValueError(f"expected_users must be > 0; got {expected_users}. It is sample rate times users.")
    return (server_lr * (sum_D + noise_D) / expected_users).float()


def next_clipping_norm(
    clipping_norm: float, noisy_share_within: float, *, quantile: float, learning_rate: float
) -> float:
    """Follow a quantile of the update norms: ``C * exp(-lr * (b - gamma))``.

    Args:
        clipping_norm: C now.
        noisy_share_within: b, noisy share of users whose norm was at most C.
        quantile: gamma, share that shall lie within, in (0, 1).
        learning_rate: Of the geometric update.

    Returns:
        C of the next round.

    Source: Andrew et al. 2021, section 2.2. (Flower 1.41 multiplies with the opposite sign.)
    """
    return clipping_norm * math.exp(-learning_rate * (noisy_share_within - quantile))


def update_noise_multiplier(noise_multiplier: float, count_noise_std: float) -> float:
    """Noise multiplier of the updates, so that updates and the count of norms within C cost sigma together.

    ``(sigma^-2 - (2 sigma_b)^-2)^(-1/2)``; the count is centred (+-1/2), so its sensitivity is 1/2.

    Args:
        noise_multiplier: sigma, what the two releases shall cost together.
        count_noise_std: sigma_b, standard deviation of the noise on the count, > sigma / 2.

    Returns:
        The multiplier for the updates, a little above sigma.

    Raises:
        ValueError: If the count alone would cost more than sigma allows.

    Source: Andrew et al. 2021, Theorem 1.
    """
    rest = noise_multiplier**-2 - (2 * count_noise_std) ** -2 if noise_multiplier else math.inf
    if not rest > 0:
        raise ValueError(
            f"count_noise_std must be > noise_multiplier / 2 = {noise_multiplier / 2}; got "
            f"{count_noise_std}. A twentieth of the expected users is usual."
        )
    return rest**-0.5
