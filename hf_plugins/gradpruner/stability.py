"""How far a plan can be trusted: does it change between steps?"""

# Shapes: T collected steps, L layers.
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Planner = Callable[[Tensor], tuple[int, ...]]


class Stability(NamedTuple):
    """What the collected steps say about a plan."""

    drop_frequency: list[float]
    """For each layer the share of bootstrap samples of steps in which it goes, in [0, 1]."""
    variation: list[float]
    """For each layer the standard deviation of its score over steps, divided by the mean."""
    halves_agree: bool
    """Whether the first and the second half of the steps choose the same layers."""


def plan_stability(
    scores_TL: Tensor, planner: Planner, *, generator: torch.Generator, rounds: int = 200
) -> Stability:
    """Resample steps with replacement and plan again each time.

    Args:
        scores_TL: Score of each layer at each step.
        planner: Layer scores (L,) -> layers that go.
        generator: Of the resampling.
        rounds: Bootstrap samples.

    Returns:
        Frequencies, variation, agreement of halves (True with fewer than four steps, where halves say
        nothing).
    """
    num_steps, num_layers = scores_TL.shape
    counts_L = torch.zeros(num_layers, dtype=torch.float64)
    for _ in range(rounds):
        chosen = torch.randint(num_steps, (num_steps,), generator=generator)
        counts_L[list(planner(scores_TL[chosen].mean(0)))] += 1
    mean_L = scores_TL.mean(0)
    deviation_L = scores_TL.std(0) if num_steps > 1 else torch.zeros_like(mean_L)
    middle = num_steps // 2
    agree = num_steps < 4 or planner(scores_TL[:middle].mean(0)) == planner(scores_TL[middle:].mean(0))
    return Stability(
        (counts_L / rounds).tolist(),
        (deviation_L / mean_L.clamp_min(torch.finfo(torch.float64).tiny)).tolist(),
        agree,
    )
