"""From accuracies to a policy update: rewards, baselines, losses, and where a search step starts.

Letters: K clients of one step, P hyper-parameters. Accuracies are shares in [0, 1].
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def released_reward(end: float, anchor: float, *, weighted: bool = True) -> float:
    """Reward of the release: ``max(0, end - anchor) * anchor``, one scalar for all clients.

    Subtracting removes the level of the start; multiplying lifts late starts, whose gains are small.

    Args:
        end: Accuracy after the step's round.
        anchor: Accuracy of the anchor model it started from.
        weighted: Multiply by the anchor (discrete mode); the continuous mode does not.

    Returns:
        Reward >= 0.

    Source: the release's search server; the paper's own formula was not readable.
    """
    return max(0.0, end - anchor) * (anchor if weighted else 1.0)


def released_loss(reward: float, log_probability_KP: Tensor, *, discrete: bool = True) -> Tensor:
    """Loss of the release: mean over clients of ``relu(-100 * reward * logp)``, logp a mean over parameters.

    Args:
        reward: From `released_reward`.
        log_probability_KP: Of the sampled actions of the clients that took part.
        discrete: The continuous mode has neither the factor 100 nor the relu.

    Returns:
        Scalar.
    """
    logp_K = log_probability_KP.mean(dim=1)
    return torch.relu(-100 * reward * logp_K).mean() if discrete else (-reward * logp_K).mean()


def reinforce_loss(
    advantage_K: Tensor,
    log_probability_KP: Tensor,
    entropy_KP: Tensor,
    active_KP: Tensor,
    *,
    entropy_weight: float,
) -> Tensor:
    """REINFORCE over the clients that took part, with an entropy bonus.

    ``-mean_k [ advantage_k * sum_p logp_kp + entropy_weight * sum_p H_kp ]``; the sum over hyper-parameters
    is the log-probability of the whole config, which the gradient estimator asks for.

    Args:
        advantage_K: Reward less baseline of each client; constants.
        log_probability_KP: Of the sampled actions.
        entropy_KP: Of the heads.
        active_KP: 1 where the config held the hyper-parameter, else 0; an idle one gets no gradient.
        entropy_weight: Weight of the bonus, >= 0.

    Returns:
        Scalar; the denominator is the number of participants K.
    """
    active_KP = active_KP.to(log_probability_KP.dtype)
    gain_K = advantage_K.to(log_probability_KP.dtype).detach() * (log_probability_KP * active_KP).sum(dim=1)
    return -(gain_K + entropy_weight * (entropy_KP * active_KP).sum(dim=1)).mean()


def linear_schedule(first: float, last: float, step: int, num_steps: int) -> float:
    """A value that moves in a straight line from ``first`` at step 0 to ``last`` at the last step."""
    return first + (last - first) * min(1.0, step / max(1, num_steps - 1))


def draw_start(starts: list[int], *, generator: torch.Generator, released: bool = False) -> int:
    """The round that a search step starts from.

    Args:
        starts: Rounds whose anchor is stored, ascending; the last round's result is no start.
        generator: Source of the draw.
        released: Draw as the release does, which never takes round 0.

    Returns:
        One of ``starts``, all equally likely.

    Raises:
        ValueError: If nothing is left to draw from.
    """
    pool = [start for start in starts if start > 0] if released else starts
    if not pool:
        raise ValueError(
            "no anchor to start from; run the anchor phase for at least one round (two for the released "
            "behaviour, which never starts at round 0)."
        )
    return pool[int(torch.randint(len(pool), (), generator=generator))]


class BucketBaseline:
    """Exponential moving mean of rewards per part of the trajectory, and of their spread.

    Gains early in training are ten times those late in it; one mean for all would call every early
    config good. Dividing by the spread lets late starts speak as loud as early ones.
    """

    def __init__(self, num_rounds: int, num_buckets: int, *, decay: float = 0.9) -> None:
        """Args:
        num_rounds: Rounds R of the trajectory.
        num_buckets: Parts of equal length; at most one a round.
        decay: Weight of the past in the moving mean, in [0, 1).
        """
        self.num_rounds = num_rounds
        self.num_buckets = max(1, min(num_buckets, num_rounds))
        self.decay = decay
        self._moments: dict[str, tuple[float, float, int]] = {}

    def _key(self, start: int, client: str) -> str:
        return f"{start * self.num_buckets // self.num_rounds}/{client}"

    def advantage(self, start: int, rewards: Mapping[str, float]) -> dict[str, float]:
        """Reward less the mean so far, over the spread so far, cut at 3; nothing known yet gives 0.

        Args:
            start: Start round.
            rewards: By client.

        Returns:
            By client.
        """
        out = {}
        for client, reward in rewards.items():
            mean, deviation, count = self._moments.get(self._key(start, client), (0.0, 0.0, 0))
            # 1.2533 makes a mean absolute deviation the standard deviation of a Gaussian.
            spread = max(1.2533 * deviation, 1e-8)
            out[client] = max(-3.0, min(3.0, (reward - mean) / spread)) if count >= 2 else 0.0
        return out

    def update(self, start: int, rewards: Mapping[str, float]) -> None:
        """Take rewards into the means; call it after `advantage`, or the reward would judge itself."""
        for client, reward in rewards.items():
            key = self._key(start, client)
            mean, deviation, count = self._moments.get(key, (reward, 0.0, 0))
            # A plain mean at first, so that the first reward does not linger.
            weight = max(1 - self.decay, 1 / (count + 1))
            mean += weight * (reward - mean)
            # Absolute, not squared: one diverged round must not silence the next twenty.
            deviation += max(1 - self.decay, 1 / max(1, count)) * (abs(reward - mean) - deviation)
            self._moments[key] = (mean, deviation, count + 1)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"moments": {key: list(value) for key, value in self._moments.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the means by saved ones."""
        self._moments = {key: (v[0], v[1], int(v[2])) for key, v in state["moments"].items()}
