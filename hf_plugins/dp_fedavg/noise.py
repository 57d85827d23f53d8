"""How much noise a round needs: of one user's share under secure aggregation, and of what lacks of them."""

import math


def share_std(noise_multiplier: float, clipping_norm: float, expected_users: float) -> float:
    """Standard deviation of one user's noise share: ``sigma * S / sqrt(m)``; m shares add up to sigma * S."""
    return noise_multiplier * clipping_norm / math.sqrt(expected_users)


def missing_std(
    noise_multiplier: float, clipping_norm: float, expected_users: float, shares_received: int
) -> float:
    """Standard deviation of the noise that a sum of shares still lacks.

    ``sigma * S * sqrt(max(0, 1 - received / m))``: users who drop out take their shares with them.

    Args:
        noise_multiplier: sigma, of the whole sum.
        clipping_norm: S.
        expected_users: m, the number of shares that were planned for.
        shares_received: Shares in the sum.

    Returns:
        What the server must add on top before it looks at the sum; 0 if there are shares enough.
    """
    return noise_multiplier * clipping_norm * math.sqrt(max(0.0, 1 - shares_received / expected_users))
