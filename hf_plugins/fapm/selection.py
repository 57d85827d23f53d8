"""The k largest scores of a tensor, exactly and with bounded memory: a sampled bracket first, a radix count
where the bracket misses. Of equal scores at the threshold the lowest flat index wins.
"""

# Shapes: N entries of one chunk, K thresholds, M sampled entries.
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_plugins.fapm.score import Scorer, chunks

# Below this size the scores fit in cache, and a plain partial sort is the fastest.
DIRECT = 1 << 16
# Above this size the mask is computed a second time instead of being kept: its bits alone would be 128 MiB.
STORED = 1 << 30
BINS = 1 << 16


class Threshold(NamedTuple):
    """Where the k-th largest score lies."""

    value: float
    """T: every larger score is taken."""
    ties: int
    """How many of the scores equal to T are taken, lowest index first."""


@dataclass
class Selection:
    """Which entries of a tensor are kept."""

    threshold: Threshold
    path: Literal["none", "all", "sorted", "bracket", "counted", "radix", "global"]
    """How the threshold was found."""
    num_positive: int = 0
    """Scores > 0."""
    num_undefined: int = 0
    """Scores that are 0/0, taken as -inf."""
    energy: float = 0.0
    """Sum of squares of the whole task vector."""
    bits: list[np.ndarray] = field(default_factory=list)
    """Packed mask of each chunk, where it was kept; else the mask is computed anew."""


def float_keys(scores_N: np.ndarray) -> np.ndarray:
    """Unsigned integers that sort as the floats do: all bits flipped below zero, the sign bit above.

    Args:
        scores_N: fp32 values without NaN and without -0.

    Returns:
        uint32 keys (N,).
    """
    bits_N = scores_N.view(np.int32)
    return (bits_N ^ ((bits_N >> 31) | np.int32(-(2**31)))).view(np.uint32)


def key_float(key: int) -> float:
    """The float whose key this is."""
    bits = key ^ 0x80000000 if key & 0x80000000 else key ^ 0xFFFFFFFF
    return float(np.array([bits], dtype=np.uint32).view(np.float32)[0])


def high_histogram(scores: Iterable[tuple[int, Tensor]]) -> np.ndarray:
    """Counts of the upper 16 bits of the keys, (65536,) int64."""
    counts = np.zeros(BINS, dtype=np.int64)
    for _, s_N in scores:
        counts += np.bincount(float_keys(s_N.numpy()) >> np.uint32(16), minlength=BINS)
    return counts


def low_histograms(scores: Iterable[tuple[int, Tensor]], bins: Sequence[int]) -> dict[int, np.ndarray]:
    """Counts of the lower 16 bits of the keys whose upper 16 bits are one of ``bins``."""
    counts = {each: np.zeros(BINS, dtype=np.int64) for each in bins}
    for _, s_N in scores:
        keys_N = float_keys(s_N.numpy())
        high_N = keys_N >> np.uint32(16)
        for each, count in counts.items():
            inside = keys_N[high_N == each] & np.uint32(0xFFFF)
            count += np.bincount(inside, minlength=BINS)
    return counts


def locate(counts: np.ndarray, k: int) -> tuple[int, int]:
    """Bin of the k-th largest, and how many of that bin are among the k.

    Args:
        counts: Counts per bin, ascending in value.
        k: Rank from the top, from 1 to the sum of the counts.

    Returns:
        The bin and the remaining rank inside of it, at least 1.
    """
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, k))
    above = int(from_top[place - 1]) if place else 0
    return len(counts) - 1 - place, k - above


def radix_thresholds(
    scores: Callable[[], Iterable[tuple[int, Tensor]]],
    ks: Sequence[int],
    combine: Callable[[np.ndarray], np.ndarray] = lambda counts: counts,
) -> list[Threshold]:
    """Exact thresholds of several ranks from two passes of counting; memory is 512 KiB a rank.

    Args:
        scores: Gives the chunks of scores anew at each call, without NaN and -0.
        ks: Ranks from the top, each from 1 to the number of scores.
        combine: Sums a histogram over processes, where the scores are spread over some.

    Returns:
        One threshold per rank, in the order of ``ks``.
    """
    high = combine(high_histogram(scores()))
    places = [locate(high, k) for k in ks]
    low = low_histograms(scores(), sorted({place for place, _ in places}))
    low = {each: combine(counts) for each, counts in low.items()}
    found = []
    for place, rest in places:
        key, ties = locate(low[place], rest)
        found.append(Threshold(key_float(place << 16 | key), ties))
    return found


def sampled_bracket(scorer: Scorer, k: int, *, seed: int = 0) -> tuple[float, float, int]:
    """Two scores between which the k-th largest almost surely lies: order statistics five sigma around it.

    Args:
        scorer: Of a tensor of more than a few thousand entries.
        k: Rank from the top.
        seed: Of the sample; the result of a selection does not depend on it.

    Returns:
        Lower and upper score (either may be infinite) and the number of entries expected between them.
    """
    numel = scorer.pair.numel
    wanted = max(min(numel // 64, DIRECT), numel // 1024)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start, stop in chunks(numel, scorer.chunk):
        pick_M = torch.randint(stop - start, (-(-(stop - start) * wanted // numel),), generator=generator)
        w_N, ft_N = scorer.pair.read(start, stop)
        if scorer.rule.method == "dare":
            parts.append(scorer.score(w_N, ft_N, start)[0][pick_M])
        else:
            parts.append(scorer.score(w_N[pick_M], ft_N[pick_M], 0)[0].clone())
    sample_M = np.sort(torch.cat(parts).nan_to_num_(nan=-torch.inf, neginf=-torch.inf).numpy())[::-1]
    count, share = len(sample_M), k / numel
    width = 5.0 * (share * (1 - share) / count) ** 0.5
    upper, lower = int(np.floor((share - width) * count)), int(np.ceil((share + width) * count))
    hi = float(sample_M[upper]) if upper >= 0 else np.inf
    lo = float(sample_M[lower]) if lower < count else -np.inf
    return lo, hi, int((min(share + width, 1.0) - max(share - width, 0.0)) * numel)


class _Candidates(NamedTuple):
    position: np.ndarray
    score: np.ndarray


def _gather(
    scorer: Scorer, lo: float, hi: float, limit: int, found: Selection
) -> tuple[int, _Candidates | None]:
    """One pass: counts, packed bits of S >= hi, and the entries strictly between lo and hi.

    Gives no candidates when there are more than ``limit`` of them: many equal scores in the bracket.
    """
    numel, chunk = scorer.pair.numel, scorer.chunk
    keep_bits = numel <= STORED
    size = min(chunk, numel)
    above, inside, other = (np.empty(size, dtype=bool) for _ in range(3))
    positions: list[np.ndarray] = []
    values: list[np.ndarray] = []
    num_above = num_inside = 0
    for start, stop in chunks(numel, chunk):
        s, d = scorer.score(*scorer.pair.read(start, stop), start)
        s_N, length = s.numpy(), stop - start
        found.energy += float(torch.dot(d, d))
        above_N = np.greater_equal(s_N, hi, out=above[:length])
        inside_N = np.greater(s_N, lo, out=inside[:length])
        # True > False: inside and not above, also where the bracket has no width.
        np.greater(inside_N, above_N, out=inside_N)
        found.num_positive += int(np.count_nonzero(np.greater(s_N, 0, out=other[:length])))
        found.num_undefined += int(np.count_nonzero(np.isnan(s_N, out=other[:length])))
        num_above += int(np.count_nonzero(above_N))
        num_inside += (here := int(np.count_nonzero(inside_N)))
        if num_inside <= limit:
            place_N = np.flatnonzero(inside_N)
            positions.append(place_N + start)
            values.append(s_N[place_N])
            assert len(place_N) == here, "count and positions of one mask differ"
        if keep_bits:
            found.bits.append(np.packbits(above_N))
    if num_inside > limit:
        return num_above, None
    return num_above, _Candidates(np.concatenate(positions), np.concatenate(values))


def _keep_candidates(found: Selection, candidates: _Candidates, threshold: Threshold, chunk: int) -> None:
    """Add the chosen candidates to the packed bits."""
    chosen = candidates.position[candidates.score > threshold.value]
    ties = candidates.position[candidates.score == threshold.value][: threshold.ties]
    place = np.concatenate([chosen, ties])
    which, offset = place // chunk, place % chunk
    order = np.argsort(which, kind="stable")
    edges = np.searchsorted(which[order], np.arange(len(found.bits) + 1))
    for index, bits in enumerate(found.bits):
        inside = offset[order[edges[index] : edges[index + 1]]]
        np.bitwise_or.at(bits, inside >> 3, (128 >> (inside & 7)).astype(np.uint8))


def survey(scorer: Scorer, found: Selection) -> None:
    """Energy, positive and undefined scores in a pass of their own, for paths that do not gather."""
    for start, stop in chunks(scorer.pair.numel, scorer.chunk):
        s, d = scorer.score(*scorer.pair.read(start, stop), start)
        found.energy += float(torch.dot(d, d))
        found.num_positive += int(np.count_nonzero(s.numpy() > 0))
        found.num_undefined += int(np.count_nonzero(np.isnan(s.numpy())))


def _counted(scorer: Scorer, k: int, value: float) -> Threshold | None:
    """Whether ``value`` itself is the threshold: decided by counting, for scores with many ties."""
    above = equal = 0
    for _, s_N in scorer.scores():
        above += int(np.count_nonzero(s_N.numpy() > value))
        equal += int(np.count_nonzero(s_N.numpy() == value))
    return Threshold(value, k - above) if above < k <= above + equal else None


def select(scorer: Scorer, k: int) -> Selection:
    """The k entries of a tensor with the largest scores.

    Memory is a few chunks, one bit an entry and about 1 % of the entries as candidates; no score is kept for
    the whole tensor.

    Args:
        scorer: Gives the scores.
        k: How many, from 0 to the size of the tensor.

    Returns:
        The selection; `masks` walks through it.
    """
    numel = scorer.pair.numel
    if k in (0, numel):
        found = Selection(
            Threshold(np.inf, 0) if k == 0 else Threshold(-np.inf, numel), "all" if k else "none"
        )
        survey(scorer, found)
        return found
    if numel <= DIRECT:
        found = Selection(Threshold(0.0, 0), "sorted")
        survey(scorer, found)
        s_N = np.concatenate([s.numpy().copy() for _, s in scorer.scores()])
        value = float(np.partition(s_N, numel - k)[numel - k])
        found.threshold = Threshold(value, k - int(np.count_nonzero(s_N > value)))
        return found
    lo, hi, expected = sampled_bracket(scorer, k)
    found = Selection(Threshold(0.0, 0), "bracket")
    num_above, candidates = _gather(scorer, lo, hi, 4 * expected + DIRECT, found)
    if candidates is not None and num_above < k <= num_above + len(candidates.score):
        need = k - num_above
        value = float(np.partition(candidates.score, -need)[-need])
        found.threshold = Threshold(value, need - int(np.count_nonzero(candidates.score > value)))
        if found.bits:
            _keep_candidates(found, candidates, found.threshold, scorer.chunk)
        return found
    found.bits = []
    for value in (hi, lo) if num_above >= k else (lo, hi):
        if np.isfinite(value) and (threshold := _counted(scorer, k, value)):
            found.threshold, found.path = threshold, "counted"
            return found
    found.threshold, found.path = radix_thresholds(scorer.scores, [k])[0], "radix"
    return found


def masks(scorer: Scorer, found: Selection) -> Iterator[tuple[int, np.ndarray]]:
    """Start and boolean mask of every chunk in order.

    Args:
        scorer: The one of the selection.
        found: What `select` gave, or a threshold of `radix_thresholds` in a `Selection` without bits.

    Yields:
        Start of the chunk and its mask (N,).
    """
    if found.bits:
        for (start, stop), bits in zip(chunks(scorer.pair.numel, scorer.chunk), found.bits, strict=True):
            yield start, np.unpackbits(bits, count=stop - start).view(bool)
        return
    if found.path in ("none", "all"):
        for start, stop in chunks(scorer.pair.numel, scorer.chunk):
            yield start, np.full(stop - start, found.path == "all")
        return
    left = found.threshold.ties
    for start, s in scorer.scores():
        s_N = s.numpy()
        mask_N = s_N > found.threshold.value
        if left:
            ties_N = np.flatnonzero(s_N == found.threshold.value)[:left]
            mask_N[ties_N] = True
            left -= len(ties_N)
        yield start, mask_N
