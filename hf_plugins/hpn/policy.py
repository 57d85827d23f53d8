"""Networks from a client's encoding to a distribution over its hyper-parameters.

Letters: K clients, E entries of an encoding, P hyper-parameters, C choices of one of them.

An action of a hyper-parameter is an index (a head of C logits) or a place in [0, 1] (a head of two numbers,
the shapes of a Beta distribution); `Output` carries both sorts side by side.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

# Number of choices of a hyper-parameter; 0 means a place in [0, 1].
Sizes = Sequence[int]


class Output(NamedTuple):
    """Distributions for K clients."""

    heads: list[Tensor]
    """One per hyper-parameter: logits (K, C), or (K, 2) with both Beta shapes above 1."""
    sizes: tuple[int, ...]
    """Number of choices of each head; 0 for Beta."""

    def probabilities(self) -> list[Tensor]:
        """(K, C) per head with choices; a Beta head gives its mean, (K, 1)."""
        return [
            head.softmax(dim=1) if size else (head[:, :1] / head.sum(1, keepdim=True))
            for head, size in zip(self.heads, self.sizes, strict=True)
        ]


def sample(output: Output, *, generator: torch.Generator) -> Tensor:
    """Draw one action per client and hyper-parameter.

    Args:
        output: Distributions.
        generator: Source of all draws.

    Returns:
        (K, P), float64: indices as whole numbers, places in [0, 1].
    """
    columns = []
    for head, size in zip(output.heads, output.sizes, strict=True):
        if size:
            drawn = torch.multinomial(head.detach().double().softmax(dim=1), 1, generator=generator)
            columns.append(drawn[:, 0].double())
        else:
            # torch's Beta takes no generator; numpy's is seeded from it.
            seed = int(torch.randint(2**62, (), generator=generator))
            alpha, beta = head.detach().double().numpy().T
            columns.append(torch.from_numpy(np.random.default_rng(seed).beta(alpha, beta)))
    return torch.stack(columns, dim=1)


def mode(output: Output) -> Tensor:
    """The action for deployment: most probable choice, mean of a Beta.

    Returns:
        (K, P), float64.
    """
    columns = [
        probabilities.argmax(dim=1).double() if size else probabilities[:, 0].double()
        for probabilities, size in zip(output.probabilities(), output.sizes, strict=True)
    ]
    return torch.stack(columns, dim=1).detach()


def log_probabilities(output: Output, actions_KP: Tensor) -> Tensor:
    """Log-probability (choices) or log-density (places) of each action, with gradient.

    Args:
        output: Distributions.
        actions_KP: From `sample`.

    Returns:
        (K, P).
    """
    columns = []
    for number, (head, size) in enumerate(zip(output.heads, output.sizes, strict=True)):
        action = actions_KP[:, number]
        if size:
            columns.append(head.log_softmax(dim=1).gather(1, action.long()[:, None])[:, 0])
        else:
            # A draw can round to a bound, where the density's logarithm is infinite.
            place = action.clamp(1e-6, 1 - 1e-6).to(head.dtype)
            columns.append(torch.distributions.Beta(head[:, 0], head[:, 1]).log_prob(place))
    return torch.stack(columns, dim=1)


def entropies(output: Output) -> Tensor:
    """Entropy of each head in nats (differential for a Beta), with gradient.

    Returns:
        (K, P).
    """
    columns = []
    for head, size in zip(output.heads, output.sizes, strict=True):
        if size:
            logp = head.log_softmax(dim=1)
            columns.append(-(logp.exp() * logp).sum(dim=1))
        else:
            columns.append(torch.distributions.Beta(head[:, 0], head[:, 1]).entropy())
    return torch.stack(columns, dim=1)


class Policy(nn.Module):
    """Ours: standardised encodings, an ordinary trunk, heads that train.

    Spectral normalisation bounds what the released network can say, and its heads never move; both are gone.
    """

    centre_E: Tensor
    scale_E: Tensor

    def __init__(self, encodings_KE: Tensor, sizes: Sizes, *, hidden: int = 64) -> None:
        """Args:
        encodings_KE: Encodings of the clients known at the start; their mean and spread standardise inputs.
        sizes: Choices of each hyper-parameter, 0 for a place in [0, 1].
        hidden: Width of the trunk.
        """
        super().__init__()
        self.sizes = tuple(sizes)
        encodings_KE = encodings_KE.float()
        spread_E = encodings_KE.std(dim=0, correction=0)
        self.register_buffer("centre_E", encodings_KE.mean(dim=0))
        # An entry that is equal for all clients says nothing; scale 1 leaves it at zero.
        self.register_buffer("scale_E", torch.where(spread_E > 1e-9, spread_E, torch.ones_like(spread_E)))
        dim = encodings_KE.shape[1]
        self.trunk = nn.Sequential(
            nn.Linear(dim, hidden), nn.LayerNorm(hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()
        )
        heads = [nn.Linear(hidden, size or 2) for size in self.sizes]
        for head in heads:
            # Start uniform: no choice is preferred before a reward has been seen.
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.heads = nn.ModuleList(heads)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, encodings_KE: Tensor) -> Output:
        """Distributions for K clients."""
        z_KE = (encodings_KE.float() - self.centre_E) / self.scale_E
        # Long encodings would start with large activations; unit mean square per entry, then 1/sqrt(E).
        hidden = self.trunk(z_KE / z_KE.shape[1] ** 0.5)
        heads = [
            self.logit_scale * head(hidden) if size else 1 + nn.functional.softplus(head(hidden))
            for head, size in zip(self.heads, self.sizes, strict=True)
        ]
        return Output(heads, self.sizes)


class ReleasedPolicy(nn.Module):
    """The released discrete network, whose probabilities cannot leave uniform.

    ``SN(Linear) - ReLU - SN(Linear)``, then heads that no optimizer holds; no biases anywhere.

    Source: FederatedScope ``autotune/pfedhpo``, behaviour only.
    """

    def __init__(self, encodings_KE: Tensor, sizes: Sizes, *, hidden: int = 64) -> None:
        """Args:
        encodings_KE: Encodings of the clients; only their length counts.
        sizes: Choices of each hyper-parameter.
        hidden: Width of the trunk.

        Raises:
        ValueError: If a hyper-parameter has no grid.
        """
        super().__init__()
        if not all(sizes):
            raise ValueError("the released discrete policy needs a grid for every range; sizes holds a 0.")
        self.sizes = tuple(sizes)
        dim = encodings_KE.shape[1]
        self.trunk = nn.Sequential(
            spectral_norm(nn.Linear(dim, hidden, bias=False)),
            nn.ReLU(),
            spectral_norm(nn.Linear(hidden, hidden, bias=False)),
        )
        self.heads = nn.ModuleList(nn.Linear(hidden, size, bias=False) for size in self.sizes)
        self.heads.requires_grad_(False)

    def forward(self, encodings_KE: Tensor) -> Output:
        """Distributions for K clients."""
        hidden = self.trunk(encodings_KE.float())
        return Output([head(hidden) for head in self.heads], self.sizes)


class ReleasedGaussianPolicy(nn.Module):
    """The released continuous network: a mean in (0, 1) that feeds on its own last value.

    The last mean is a buffer here, so that a saved state gives the same answer again.

    Source: FederatedScope ``autotune/pfedhpo``, behaviour only.
    """

    last_mean_KP: Tensor

    def __init__(self, encodings_KE: Tensor, num_params: int, *, hidden: int = 32) -> None:
        """Args:
        encodings_KE: Encodings of the clients.
        num_params: Hyper-parameters P.
        hidden: Width of the branch that sees the last mean.
        """
        super().__init__()
        dim = encodings_KE.shape[1]
        self.encoding_branch = nn.Sequential(
            spectral_norm(nn.Linear(dim, 64, bias=False)), nn.ReLU(), nn.Linear(64, num_params, bias=False)
        )
        self.mean_branch = nn.Sequential(
            spectral_norm(nn.Linear(num_params, hidden)),
            nn.ReLU(),
            spectral_norm(nn.Linear(hidden, hidden)),
            nn.ReLU(),
            spectral_norm(nn.Linear(hidden, num_params)),
        )
        self.out = nn.Linear(2 * num_params, num_params)
        self.register_buffer("last_mean_KP", torch.full((len(encodings_KE), num_params), 0.5))

    def forward(self, encodings_KE: Tensor) -> Tensor:
        """Means (K, P) in (0, 1)."""
        parts = [self.encoding_branch(encodings_KE.float()), self.mean_branch(self.last_mean_KP)]
        return self.out(torch.cat(parts, dim=1)).sigmoid()

    def remember(self, mean_KP: Tensor) -> None:
        """Keep a mean as the next step's input."""
        self.last_mean_KP.copy_(mean_KP.detach())


def annealed_variance(step: int, num_steps: int) -> float:
    """Variance of the released continuous policy: 2.0 to 0.1 over the first half of the search, then 0.1."""
    half = max(1, num_steps // 2)
    return 2.0 + (0.1 - 2.0) * min(1.0, step / half)


def clamped_gaussian(
    mean_KP: Tensor, variance: float, *, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw as the release does: a Gaussian cut at 0 and 1, with the density of the uncut one.

    Returns:
        Actions (K, P) in [0, 1], and log-densities (K, P) at them with gradient. The densities are biased
        wherever a draw was cut: 72 % of the draws at variance 2 and mean 0.5.
    """
    noise = torch.randn(mean_KP.shape, generator=generator, dtype=mean_KP.dtype)
    actions_KP = (mean_KP.detach() + variance**0.5 * noise).clamp(0, 1)
    return actions_KP, torch.distributions.Normal(mean_KP, variance**0.5).log_prob(actions_KP)
