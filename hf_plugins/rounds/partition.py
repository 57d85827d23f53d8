"""Split records over users: by a Dirichlet law over classes, or by a name that comes with each record."""

from collections.abc import Hashable, Sequence

import numpy as np


def dirichlet_split(labels: Sequence[int], num_clients: int, *, alpha: float, seed: int) -> list[np.ndarray]:
    """Records of each client, about equally many, with class shares drawn from a Dirichlet law.

    Each client draws its own shares of the classes, ``p ~ Dirichlet(alpha)``, and takes as many records as
    the others; a class that runs out is left out of the later draws.

    Args:
        labels: Class of each record.
        num_clients: Clients, at most as many as records.
        alpha: Concentration, > 0: 0.1 gives one or two classes a client, 100 gives all alike.
        seed: Of the draws.

    Returns:
        For each client the sorted indices of its records; they differ by at most one in number and no
        record has two owners.

    Raises:
        ValueError: If there are fewer records than clients, or ``alpha`` is not positive.

    Source: Hsu et al. 2019 (arXiv 1909.06335), with equal sizes.
    """
    if not alpha > 0:
        raise ValueError(f"alpha must be > 0; got {alpha}. 0.3 is skewed, 100 nearly uniform.")
    if not 1 <= num_clients <= len(labels):
        raise ValueError(f"{num_clients} clients need at least as many records; there are {len(labels)}.")
    rng = np.random.default_rng(seed)
    classes, inverse = np.unique(np.asarray(labels), return_inverse=True)
    pools = [list(rng.permutation(np.flatnonzero(inverse == c))) for c in range(len(classes))]
    sizes = [len(part) for part in np.array_split(np.arange(len(labels)), num_clients)]
    found = []
    for size in sizes:
        shares = rng.dirichlet(np.full(len(classes), alpha))
        mine: list[int] = []
        while len(mine) < size:
            left = np.array([len(pool) for pool in pools])
            # A share of exactly 0 can come out of a small alpha; then any class that is left will do.
            weights = np.where(left > 0, shares + 1e-12, 0.0)
            counts = rng.multinomial(size - len(mine), weights / weights.sum())
            for pool, count in zip(pools, np.minimum(counts, left), strict=True):
                mine += [pool.pop() for _ in range(count)]
        found.append(np.sort(np.array(mine, dtype=np.int64)))
    return found


def split_by(names: Sequence[Hashable]) -> list[np.ndarray]:
    """Records of each user, users in the order of their first record."""
    owned: dict[Hashable, list[int]] = {}
    for index, name in enumerate(names):
        owned.setdefault(name, []).append(index)
    return [np.array(indices, dtype=np.int64) for indices in owned.values()]
