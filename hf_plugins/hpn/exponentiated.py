"""FedEx, the rival without personalisation: one distribution over configs, moved by exponentiated gradients.

Letters: K clients of a round, A arms (configs), P hyper-parameters.
"""

import math
from typing import Any

import torch
from torch import Tensor


class FedEx:
    """Exponentiated gradient over a list of configs, shared by all clients.

    Each client of a round draws an arm from ``theta``. Losses are read after local training; with the
    round's weighted mean as baseline the gradient estimate of arm a is
    ``sum_k w_k * (loss_k - baseline) * 1[a_k = a] / theta_a``, and ``theta <- theta * exp(-eta * gradient)``.

    Source: Khodak et al., *Federated Hyperparameter Tuning*, NeurIPS 2021, algorithm 2 with the schedule
    ``aggressive``: ``eta_t = sqrt(2 ln A) / ||gradient_t||_inf``.
    """

    def __init__(self, arms_AP: Tensor) -> None:
        """Args:
        arms_AP: Actions of each arm.

        Raises:
        ValueError: If there are fewer than two arms.
        """
        if len(arms_AP) < 2:
            raise ValueError(f"FedEx needs at least two configs to choose from; got {len(arms_AP)}.")
        self.arms_AP = arms_AP.double()
        self.log_theta_A = torch.full((len(arms_AP),), -math.log(len(arms_AP)), dtype=torch.float64)

    @property
    def theta_A(self) -> Tensor:
        """Probability of each arm."""
        return self.log_theta_A.softmax(dim=0)

    def sample(self, num_clients: int, *, generator: torch.Generator) -> Tensor:
        """An arm for each client; (K,)."""
        return torch.multinomial(self.theta_A, num_clients, replacement=True, generator=generator)

    def update(self, arms_K: Tensor, losses_K: Tensor, weights_K: Tensor) -> None:
        """Move ``theta`` after a round.

        Args:
            arms_K: Arm of each participant.
            losses_K: Its loss after local training.
            weights_K: Its weight; normalised here.
        """
        weights_K = weights_K.double() / weights_K.double().sum()
        advantage_K = losses_K.double() - (weights_K * losses_K.double()).sum()
        theta_A = self.theta_A
        gradient_A = torch.zeros_like(theta_A).index_add_(
            0, arms_K, weights_K * advantage_K / theta_A[arms_K]
        )
        largest = float(gradient_A.abs().max())
        if largest > 0:
            step = math.sqrt(2 * math.log(len(theta_A))) / largest
            self.log_theta_A = (self.log_theta_A - step * gradient_A).log_softmax(dim=0)

    def best(self) -> Tensor:
        """Actions of the most probable arm; (P,)."""
        return self.arms_AP[int(self.log_theta_A.argmax())]

    def state_dict(self) -> dict[str, Any]:
        """Tensors of the state."""
        return {"arms": self.arms_AP, "log_theta": self.log_theta_A}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the state by a saved one."""
        self.arms_AP, self.log_theta_A = state["arms"], state["log_theta"]
