"""Many keeps at once: the masks of growing keeps are nested, so one ranking of a tensor serves a grid."""

# Shapes: N entries of one chunk, G keeps in ascending order.
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hf_plugins.fapm.score import CHUNK, Pair, Rule, Scorer, mean_magnitude
from hf_plugins.fapm.selection import Threshold, radix_thresholds
from hf_plugins.fapm.task_vector import check_finite, check_keep, num_kept


@dataclass
class CurveSums:
    """What each keep of the grid holds of one tensor, or of several after `add`."""

    keeps: tuple[float, ...]
    numel: int
    """Entries."""
    kept: np.ndarray
    """Entries chosen, (G,)."""
    effective: np.ndarray
    """Entries whose stored output differs from the stored pre-trained value, (G,)."""
    energy: np.ndarray
    """Sum of squares of the kept differences, (G,)."""
    relative: np.ndarray
    """Sum of \\|dW\\|/\\|W\\| over kept entries with W other than 0, (G,)."""
    total_energy: float
    """Sum of squares of the whole task vector."""

    def add(self, other: "CurveSums") -> "CurveSums":
        """Both together."""
        return CurveSums(
            self.keeps,
            self.numel + other.numel,
            self.kept + other.kept,
            self.effective + other.effective,
            self.energy + other.energy,
            self.relative + other.relative,
            self.total_energy + other.total_energy,
        )

    def rows(self) -> list[dict[str, float]]:
        """One row a keep: keep, effective density, kept energy, mean relative change of the kept entries."""
        return [
            {
                "keep": keep,
                "effective_density": float(self.effective[g] / max(self.numel, 1)),
                "kept_energy": float(self.energy[g] / self.total_energy) if self.total_energy else 1.0,
                "mean_relative_change": float(self.relative[g] / max(self.kept[g], 1)),
            }
            for g, keep in enumerate(self.keeps)
        ]


def level_chunks(scorer: Scorer, keeps: Sequence[float]) -> Iterator[tuple[int, np.ndarray]]:
    """For every entry, the index of the first keep whose mask holds it.

    Args:
        scorer: Of the tensor.
        keeps: Shares in ascending order, (G,).

    Yields:
        Start of a chunk and its levels (N,) uint8; G stands for never. ``levels <= g`` is the mask of keep g.
    """
    numel = scorer.pair.numel
    ks = [num_kept(numel, keep) for keep in keeps]
    inner = sorted({k for k in ks if 0 < k < numel})
    found = dict(zip(inner, radix_thresholds(scorer.scores, inner), strict=True)) if inner else {}
    edges = [found.get(k, Threshold(np.inf if k == 0 else -np.inf, 0)) for k in ks]
    left = [edge.ties for edge in edges]
    for start, s in scorer.scores():
        s_N = s.numpy()
        level_N = np.full(len(s_N), len(keeps), dtype=np.uint8)
        for g in reversed(range(len(keeps))):
            if ks[g] == numel:
                level_N[:] = g
                continue
            level_N[s_N > edges[g].value] = g
            if left[g]:
                ties_N = np.flatnonzero(s_N == edges[g].value)[: left[g]]
                level_N[ties_N] = g
                left[g] -= len(ties_N)
        yield start, level_N


def keep_curve(
    pair: Pair,
    keeps: Sequence[float],
    *,
    rule: Rule | None = None,
    dtype: torch.dtype | None = None,
    chunk: int = CHUNK,
) -> CurveSums:
    """What every keep of a grid would hold of one tensor.

    Args:
        pair: The tensor before and after.
        keeps: Shares in [0, 1], ascending.
        rule: Ranks the entries; None takes the paper's.
        dtype: Of the output, which decides what really changes; None keeps the pre-trained one's.
        chunk: Entries held at once.

    Returns:
        Sums for each keep.

    Raises:
        ValueError: If the keeps are no ascending shares, or a value is not finite.
    """
    check_keeps(keeps)
    mu, _ = mean_magnitude(pair, chunk=chunk)
    scorer = Scorer(pair, rule or Rule(), mu=mu, chunk=chunk)
    size = len(keeps) + 1
    kept, effective, energy, relative = (np.zeros(size) for _ in range(4))
    for start, level_N in level_chunks(scorer, keeps):
        w, ft = pair.read(start, start + len(level_N))
        target = dtype or w.dtype
        changed_N = (ft.to(target) != w.to(target)).numpy()
        w_N, d_N = w.float().numpy(), (ft.float() - w.float()).numpy()
        share_N = np.divide(np.abs(d_N), np.abs(w_N), out=np.zeros_like(d_N), where=w_N != 0)
        kept += np.bincount(level_N, minlength=size)
        effective += np.bincount(level_N, weights=changed_N, minlength=size)
        energy += np.bincount(level_N, weights=np.square(d_N, dtype=np.float64), minlength=size)
        relative += np.bincount(level_N, weights=share_N, minlength=size)
    check_finite(pair, mu, float(energy.sum()), chunk=chunk)
    sums = [np.cumsum(x)[:-1] for x in (kept, effective, energy, relative)]
    return CurveSums(tuple(keeps), pair.numel, sums[0], sums[1], sums[2], sums[3], float(energy.sum()))


def check_keeps(keeps: Sequence[float]) -> None:
    """Refuse a grid that is not ascending or leaves [0, 1].

    Raises:
        ValueError: With what is wrong.
    """
    for keep in keeps:
        check_keep(keep)
    if not keeps or list(keeps) != sorted(set(keeps)) or len(keeps) > 200:
        raise ValueError(f"keeps must be 1 to 200 different shares in ascending order; got {list(keeps)}.")
