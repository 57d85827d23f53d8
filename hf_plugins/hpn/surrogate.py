"""Everything a search has tried, used again: a regression from (client, config) to gain.

Letters: N logged trials, K clients, P hyper-parameters, E entries of an encoding, J columns of the design.

A search of T steps logs T * K trials, and REINFORCE looks at each once. Ridge regression on
(config features) x (client features) uses all of them for every decision. Client features are a constant
(what holds for everyone), the standardised encoding (what similar clients share) and one indicator a client
(what only its own trials can tell), each with its own penalty: more is believed of what more trials support.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def config_features(actions_NP: Tensor, sizes: Sequence[int], *, pairs: float = 0.2) -> Tensor:
    """A constant, one-hot of each choice, and of each pair of choices of two hyper-parameters.

    Args:
        actions_NP: Indices; a place in [0, 1] (size 0) gives itself, its square and its cube.
        sizes: Choices of each hyper-parameter.
        pairs: Scale of the pairs; below 1, because effects of single choices are larger and easier to learn.
            0 leaves them out.

    Returns:
        (N, J), float64.
    """
    singles = []
    for number, size in enumerate(sizes):
        action_N = actions_NP[:, number]
        if size:
            singles.append(torch.nn.functional.one_hot(action_N.long(), size).double())
        else:
            place_N = 2 * action_N.double() - 1
            singles.append(torch.stack([place_N, place_N**2, place_N**3], dim=1))
    parts = [torch.ones(len(actions_NP), 1, dtype=torch.float64), *singles]
    if pairs:
        for i, first in enumerate(singles):
            for second in singles[i + 1 :]:
                parts.append(pairs * (first[:, :, None] * second[:, None, :]).flatten(1))
    return torch.cat(parts, dim=1)


def client_features(
    encodings_KE: Tensor, *, shared: float = 1.0, similar: float = 0.5, own: float = 1.0
) -> Tensor:
    """What distinguishes clients, scaled so that one ridge penalty weighs the three parts.

    Args:
        encodings_KE: Encodings.
        shared: Scale of the constant.
        similar: Scale of the standardised encoding (its mean squared norm over clients).
        own: Scale of the indicator of each client.

    Returns:
        (K, 1 + E + K), float64.
    """
    z_KE = encodings_KE.double() - encodings_KE.double().mean(dim=0)
    z_KE = z_KE / z_KE.std(dim=0, correction=0).clamp_min(1e-9)
    z_KE = z_KE / z_KE.square().sum(dim=1).mean().sqrt().clamp_min(1e-9)
    num = len(encodings_KE)
    constant = torch.full((num, 1), shared, dtype=torch.float64)
    return torch.cat([constant, similar * z_KE, own * torch.eye(num, dtype=torch.float64)], dim=1)


class Surrogate:
    """Ridge regression on products of config features and client features, solved exactly.

    Conjugate kernels: with config features f and client features c, the prior covariance of two trials is
    ``(f . f') * (c . c')``.
    """

    def __init__(self, encodings_KE: Tensor, sizes: Sequence[int], *, ridge: float = 1.0) -> None:
        """Args:
        encodings_KE: Encodings of the clients, in the order of their numbers.
        sizes: Choices of each hyper-parameter, 0 for a place in [0, 1].
        ridge: Noise variance over prior variance; larger believes less.
        """
        self.sizes = tuple(sizes)
        self.ridge = ridge
        self._client_KC = client_features(encodings_KE)
        self._weights_FC: Tensor | None = None

    def fit(self, clients_N: Tensor, actions_NP: Tensor, gains_N: Tensor) -> None:
        """Fit on logged trials.

        Trials of one client and one config count as their mean with their number as weight, so that a
        search's length does not set the cost of this.

        Args:
            clients_N: Number of the client of each trial.
            actions_NP: Actions tried.
            gains_N: What they gained; compare like with like (subtract the mean of the same start rounds).

        Raises:
            ValueError: If there is no trial.
        """
        if not len(gains_N):
            raise ValueError("the log holds no trial to learn from; search for at least one step first.")
        keys = torch.cat([clients_N[:, None].double(), actions_NP.double()], dim=1)
        unique, inverse = torch.unique(keys, dim=0, return_inverse=True)
        count = torch.bincount(inverse, minlength=len(unique)).double()
        mean = torch.zeros(len(unique), dtype=torch.float64).index_add_(0, inverse, gains_N.double()) / count
        config = config_features(unique[:, 1:], self.sizes)
        client = self._client_KC[unique[:, 0].long()]
        # Dual form: as many unknowns as distinct trials, not as products of features.
        kernel = (config @ config.T) * (client @ client.T)
        dual = torch.linalg.solve(kernel + torch.diag(self.ridge / count), mean)
        self._weights_FC = config.T @ (dual[:, None] * client)

    def predict(self, clients_N: Tensor, actions_NP: Tensor) -> Tensor:
        """Expected gain of each pair.

        Args:
            clients_N: Numbers of clients.
            actions_NP: Actions.

        Returns:
            (N,), float64.

        Raises:
            RuntimeError: If it was not fitted.
        """
        if self._weights_FC is None:
            raise RuntimeError("predict() comes after fit(); fit the surrogate on the search's log first.")
        config = config_features(actions_NP, self.sizes)
        return ((config @ self._weights_FC) * self._client_KC[clients_N.long()]).sum(dim=1)

    def best(self, *, num_candidates: int = 2000, generator: torch.Generator) -> Tensor:
        """The actions of the highest expected gain for every client.

        Args:
            num_candidates: Configs looked at; if the grid holds no more than that, all of it is.
            generator: Draws candidates of larger spaces.

        Returns:
            (K, P), float64.
        """
        candidates = self.candidates(num_candidates, generator)
        scores = torch.stack(
            [self.predict(torch.full((len(candidates),), k), candidates) for k in range(len(self._client_KC))]
        )
        return candidates[scores.argmax(dim=1)]

    def candidates(self, num_candidates: int, generator: torch.Generator) -> Tensor:
        """All configs of a small grid, else that many drawn uniformly; (M, P), float64."""
        total = 1
        for size in self.sizes:
            total *= size
        if 0 < total <= num_candidates:
            return (
                torch.cartesian_prod(*(torch.arange(size) for size in self.sizes)).reshape(total, -1).double()
            )
        columns = [
            torch.randint(size, (num_candidates,), generator=generator).double()
            if size
            else torch.rand(num_candidates, generator=generator, dtype=torch.float64)
            for size in self.sizes
        ]
        return torch.stack(columns, dim=1)


def normalised_gains(
    gains_N: Tensor, clients_N: Tensor, starts_N: Tensor, num_rounds: int, num_buckets: int
) -> Tensor:
    """Gains made comparable: less the median of the same client and part of the trajectory, over its spread.

    What is left says how much better or worse a config was than what else was tried there; late parts,
    where all gains are small, count as much as early ones. The spread is 1.4826 times the median absolute
    deviation (a tenth of the standard deviation at least), and values are cut at 3 spreads: a diverged round
    must speak against its config without drowning the small differences between good ones.

    Args:
        gains_N: Gains.
        clients_N: Number of the client of each.
        starts_N: Start round of each.
        num_rounds: Rounds R.
        num_buckets: Parts of the trajectory.

    Returns:
        (N,), float64, in [-3, 3].
    """
    num_buckets = max(1, min(num_buckets, num_rounds))
    group_N = (starts_N * num_buckets // num_rounds) * (int(clients_N.max()) + 1) + clients_N
    out_N = gains_N.double().clone()
    for group in torch.unique(group_N):
        mine = group_N == group
        centred = out_N[mine] - out_N[mine].median()
        spread = max(
            1.4826 * float(centred.abs().median()), 0.1 * float(centred.square().mean().sqrt()), 1e-8
        )
        out_N[mine] = (centred / spread).clamp(-3, 3)
    return out_N
