"""Who takes part in a round: sampling modes by name, the same names that the accountant knows."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from hf_plugins.rounds.seeds import generator_for

CohortMode = Literal["poisson", "fixed", "all"]


@dataclass(kw_only=True, frozen=True)
class Sampling:
    """How the cohort of a round is drawn.

    ``poisson``: each client independently with probability ``rate``; a round may have nobody. ``fixed``:
    exactly ``size`` clients without replacement. ``all``: everybody.
    """

    mode: CohortMode = "all"
    """How; see above."""
    rate: float = 1.0
    """Probability of a client per round (poisson)."""
    size: int = 0
    """Clients per round (fixed)."""
    secure: bool = False
    """Draw from the operating system instead of the run's seed: nobody can repeat or foresee a cohort."""

    def __post_init__(self) -> None:
        wrong = []
        if self.mode not in get_args(CohortMode):
            wrong.append(
                f"sampling mode must be one of {', '.join(get_args(CohortMode))}; got {self.mode!r}."
            )
        if not 0 < self.rate <= 1:
            wrong.append(f"rate must lie in (0, 1]; got {self.rate}. It is a share: write 0.1 for 10 %.")
        if self.mode == "fixed" and self.size < 1:
            wrong.append(f"fixed sampling needs size >= 1, the clients in each round; got {self.size}.")
        if wrong:
            raise ValueError(" | ".join(wrong))

    def expected_size(self, num_clients: int) -> float:
        """Clients in an average round; exact for fixed and all."""
        return {"poisson": self.rate * num_clients, "fixed": float(self.size), "all": float(num_clients)}[
            self.mode
        ]

    def draw(self, client_ids: Sequence[int], *, seed: int, round_index: int) -> list[int]:
        """The cohort of one round, sorted; a function of its arguments alone unless ``secure``.

        Raises:
            ValueError: If fixed sampling asks for more clients than there are.
        """
        ids = sorted(client_ids)
        if self.mode == "all":
            return ids
        if self.mode == "fixed" and self.size > len(ids):
            raise ValueError(f"size={self.size} clients a round are asked for, but there are {len(ids)}.")
        if self.secure:
            system = random.SystemRandom()
            if self.mode == "fixed":
                return sorted(system.sample(ids, self.size))
            return [i for i in ids if system.random() < self.rate]
        generator = generator_for(seed, "cohort", round_index)
        if self.mode == "fixed":
            return sorted(ids[i] for i in torch.randperm(len(ids), generator=generator)[: self.size].tolist())
        # float64: a rate such as 0.1 would be rounded to 24 bits otherwise, and the accountant uses 53.
        drawn = torch.rand(len(ids), generator=generator, dtype=torch.float64) < self.rate
        return [i for i, take in zip(ids, drawn.tolist(), strict=True) if take]
