"""A small sample that keeps the distribution: strata of quality class and cluster, kernel herding inside.

Also the two forms of the authors' release, for reproduction: similarity to everything (centrality) and graph
cut. Nothing here forms an n x n matrix: memory is O(n d), whatever the method.
"""

# n rows, d features, k clusters, m rows chosen.

import math
from collections.abc import Sequence

import numpy as np

METHODS = ("stratified", "herding", "random", "centrality", "graph_cut")
BLOCK = 2048
# Below this a stratum is sampled at random: a kernel mean of a few rows says nothing.
SMALL = 64


def largest_remainder(weights: Sequence[float] | np.ndarray, total: int) -> np.ndarray:
    """Whole numbers in proportion to ``weights`` whose sum is ``total``; ties go to the earlier part.

    Raises:
        ValueError: If a weight is negative, all are 0, or ``total`` is negative.
    """
    shares = np.asarray(weights, float)
    if total < 0 or (shares < 0).any() or (shares.sum() == 0 and total > 0):
        raise ValueError(
            f"weights must be >= 0 with a positive sum, and total >= 0; got {list(weights)} and {total}."
        )
    if total == 0:
        return np.zeros(len(shares), int)
    exact = shares * total / shares.sum()
    counts = np.floor(exact + 1e-12).astype(int)
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[: total - counts.sum()]] += 1
    return counts


def kmeans(x_nd: np.ndarray, k: int, generator: np.random.Generator, *, iterations: int = 15) -> np.ndarray:
    """Cluster numbers by Lloyd's iterations from k-means++ seeds, in blocks of rows.

    Returns:
        (n,) int64 in [0, k); a cluster may be empty.
    """
    n = len(x_nd)
    k = min(k, n)
    # Seeding on some rows costs O(k) passes over them instead of over all.
    pool = x_nd[generator.choice(n, min(n, 20 * k), replace=False)]
    centres = [pool[generator.integers(len(pool))]]
    nearest = np.full(len(pool), np.inf)
    for _ in range(1, k):
        nearest = np.minimum(nearest, ((pool - centres[-1]) ** 2).sum(1))
        total = nearest.sum()
        pick = generator.choice(len(pool), p=nearest / total) if total > 0 else generator.integers(len(pool))
        centres.append(pool[pick])
    centre_kd = np.stack(centres)
    labels = np.zeros(n, int)
    for _ in range(iterations):
        before = labels.copy()
        sums, counts = np.zeros_like(centre_kd), np.zeros(k)
        for start in range(0, n, BLOCK):
            block = x_nd[start : start + BLOCK]
            distance = (centre_kd**2).sum(1) - 2 * block @ centre_kd.T
            found = distance.argmin(1)
            labels[start : start + BLOCK] = found
            np.add.at(sums, found, block)
            counts += np.bincount(found, minlength=k)
        filled = counts > 0
        centre_kd[filled] = sums[filled] / counts[filled, None]
        if (labels == before).all():
            break
    return labels


def kernel_width(x_nd: np.ndarray, generator: np.random.Generator) -> float:
    """Median distance of up to 500 rows: the usual width of an RBF kernel."""
    some = x_nd[generator.choice(len(x_nd), min(len(x_nd), 500), replace=False)].astype(float)
    square = (some**2).sum(1)
    distance = np.maximum(square[:, None] + square - 2 * some @ some.T, 0)
    upper = distance[np.triu_indices(len(some), 1)]
    median = float(np.sqrt(np.median(upper))) if len(upper) else 1.0
    return median if median > 0 else 1.0


def _rbf(a_nd: np.ndarray, b_nd: np.ndarray, width: float) -> np.ndarray:
    square = (a_nd**2).sum(1)[:, None] + (b_nd**2).sum(1) - 2 * a_nd @ b_nd.T
    return np.exp(-np.maximum(square, 0) / (2 * width**2))


def herd(x_nd: np.ndarray, m: int, *, width: float) -> np.ndarray:
    """Kernel herding: rows that keep the mean of the kernel's features, O(n d) memory.

    ``argmax_x mean_j k(x, x_j) - sum_s k(x, x_s) / (t + 1)`` over rows not yet chosen.

    Returns:
        (m,) row numbers in the order chosen.
    """
    n = len(x_nd)
    mean_n = np.empty(n)
    for start in range(0, n, BLOCK):
        total = np.zeros(min(BLOCK, n - start))
        for other in range(0, n, BLOCK):
            total += _rbf(x_nd[start : start + BLOCK], x_nd[other : other + BLOCK], width).sum(1)
        mean_n[start : start + BLOCK] = total / n
    held_n, free_n = np.zeros(n), np.ones(n, bool)
    chosen = np.empty(m, int)
    for step in range(m):
        gain = np.where(free_n, mean_n - held_n / (step + 1), -np.inf)
        pick = int(gain.argmax())
        chosen[step], free_n[pick] = pick, False
        held_n += _rbf(x_nd, x_nd[pick : pick + 1], width)[:, 0]
    return chosen


def centrality(x_nd: np.ndarray, m: int) -> np.ndarray:
    """The released selection: the m rows with the largest sum of similarities to all rows.

    The row sums of ``X X^T`` are ``X (sum of X)``: no n x n matrix is needed. It picks the densest region.
    """
    gain = x_nd @ x_nd.sum(0, dtype=float)
    return np.argsort(-gain, kind="stable")[:m]


def graph_cut(x_nd: np.ndarray, m: int, *, lam: float = 1.0) -> np.ndarray:
    """Greedy graph cut: the released gain minus ``2 lam`` times the similarity to what is chosen."""
    gain = x_nd @ x_nd.sum(0, dtype=float)
    chosen = np.empty(m, int)
    for step in range(m):
        pick = int(gain.argmax())
        chosen[step] = pick
        gain -= 2 * lam * (x_nd @ x_nd[pick])
        gain[chosen[: step + 1]] = -np.inf
    return chosen


def _stratified(x_nd: np.ndarray, m: int, generator: np.random.Generator) -> np.ndarray:
    k = min(math.ceil(math.sqrt(len(x_nd) / 2)), 200)
    labels = kmeans(x_nd, k, generator)
    counts = np.bincount(labels, minlength=k)
    chosen = []
    for cluster, size in enumerate(largest_remainder(counts, m)):
        members = np.flatnonzero(labels == cluster)
        if size == 0:
            continue
        if len(members) < SMALL:
            chosen.append(generator.choice(members, size, replace=False))
        else:
            inside = x_nd[members]
            chosen.append(members[herd(inside, int(size), width=kernel_width(inside, generator))])
    return np.concatenate(chosen)


def sample_rows(
    x_nd: np.ndarray,
    classes: np.ndarray,
    ratio: float,
    *,
    method: str = "stratified",
    seed: int = 0,
    lam: float = 1.0,
) -> np.ndarray:
    """Choose ``round(ratio n)`` rows so that classes and clusters keep their shares.

    Args:
        x_nd: (n, d) float embeddings, rows of length 1.
        classes: (n,) quality classes of the rows; a class may be absent, and may be of any size.
        ratio: Share of rows, in (0, 1].
        method: ``stratified`` (classes x k-means clusters, herding inside large ones), ``herding``,
            ``random``, or the released ``centrality`` and ``graph_cut``; each within the classes.
        seed: The same seed gives the same rows.
        lam: Weight of diversity in ``graph_cut``.

    Returns:
        Row numbers in a shuffled order.

    Raises:
        ValueError: If a value is out of its range or the lengths differ.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must lie in (0, 1]; got {ratio}. It is a share: 0.2 keeps a fifth.")
    if method not in METHODS:
        raise ValueError(f"sampling method must be one of {', '.join(METHODS)}; got {method!r}.")
    if len(x_nd) != len(classes) or len(x_nd) == 0:
        raise ValueError(
            f"sampling needs one class for each of at least one row; got {len(x_nd)} and {len(classes)}."
        )
    generator = np.random.default_rng(seed)
    names, member = np.unique(classes, return_inverse=True)
    total = max(1, math.floor(ratio * len(x_nd) + 0.5))
    chosen = []
    for index, size in enumerate(largest_remainder(np.bincount(member, minlength=len(names)), total)):
        rows = np.flatnonzero(member == index)
        inside, size = x_nd[rows], int(size)
        if size == len(rows):
            found = np.arange(size)
        elif size == 0:
            continue
        elif method == "random":
            found = generator.choice(len(rows), size, replace=False)
        elif method == "centrality":
            found = centrality(inside, size)
        elif method == "graph_cut":
            found = graph_cut(inside, size, lam=lam)
        elif method == "herding":
            found = herd(inside, size, width=kernel_width(inside, generator))
        else:
            found = _stratified(inside, size, generator)
        chosen.append(rows[found])
    return generator.permutation(np.concatenate(chosen))


def total_variation(part: np.ndarray, whole: np.ndarray) -> float:
    """Half the L1 distance of the label shares of a sample and of the whole, in [0, 1]."""
    names = np.union1d(part, whole)
    shares = [np.array([(labels == name).mean() for name in names]) for labels in (part, whole)]
    return float(np.abs(shares[0] - shares[1]).sum() / 2)


def mmd(part_md: np.ndarray, whole_nd: np.ndarray, *, width: float) -> float:
    """Maximum mean discrepancy of a sample to the whole with an RBF kernel."""

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        total = sum(
            _rbf(a[i : i + BLOCK], b[j : j + BLOCK], width).sum()
            for i in range(0, len(a), BLOCK)
            for j in range(0, len(b), BLOCK)
        )
        return float(total) / (len(a) * len(b))

    square = mean(part_md, part_md) + mean(whole_nd, whole_nd) - 2 * mean(part_md, whole_nd)
    return math.sqrt(max(square, 0.0))
