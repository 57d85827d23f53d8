"""FAPM on one tensor: W + M * (W' - W) with the mask of `selection`, and what became of the task vector."""

# Shapes: N entries of one chunk, flat.
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_plugins.fapm.score import (
    CHUNK,
    METHODS,
    Method,
    Pair,
    Rule,
    Scorer,
    TensorPair,
    chunks,
    mean_magnitude,
)
from hf_plugins.fapm.selection import Selection, masks, select

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Equal-sized integers, in which a choice between two stored values is exact whatever they mean as floats.
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass
class PruneStats:
    """What was kept of one tensor's task vector."""

    numel: int
    """Entries n."""
    num_kept: int
    """Entries chosen, k = int(n * keep)."""
    mean_magnitude: float
    """mu, the mean of the pre-trained magnitudes."""
    threshold: float
    """Score of the last entry chosen."""
    ties_taken: int
    """Chosen entries whose score equals the threshold."""
    path: str
    """How the threshold was found: none, all, sorted, bracket, counted, radix, global, or blend (WiSE-FT)."""
    positive_ratio: float
    """Share of entries with a score above 0: moved, and larger than the mean magnitude."""
    num_zero_base: int
    """Entries whose pre-trained value is 0."""
    num_undefined: int
    """Entries whose score is 0/0; they are never chosen while another is left."""
    moved_ratio: float = 0.0
    """Share of entries that fine-tuning changed, as stored."""
    effective_density: float = 0.0
    """Share of entries whose stored output differs from the stored pre-trained value."""
    kept_energy: float = 0.0
    """Squared norm of what the output moved, as stored, over that of the whole task vector."""
    by_magnitude: bool = False
    """Whether the pre-trained tensor is all zero, so that magnitude ranked the entries."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; infinite thresholds as text."""
        found = asdict(self)
        if not math.isfinite(self.threshold):
            found["threshold"] = str(self.threshold)
        return found


def num_kept(numel: int, keep: float) -> int:
    """Entries that a share stands for, ``int(n * keep)`` as in the authors' script."""
    return int(numel * keep)


def check_keep(keep: float) -> None:
    """Refuse what is no share.

    Raises:
        ValueError: If ``keep`` lies outside of [0, 1].
    """
    if not 0.0 <= keep <= 1.0:
        raise ValueError(f"keep must lie in [0, 1]; got {keep}. It is a share: write 0.1 for 10 %.")


def choose(
    pair: Pair, keep: float, *, rule: Rule, mu: float | None = None, chunk: int = CHUNK
) -> tuple[Scorer, Selection, PruneStats]:
    """Find the entries of a tensor that are kept.

    Args:
        pair: The tensor before and after.
        keep: Share of entries kept, in [0, 1].
        rule: Ranks the entries.
        mu: Mean magnitude; None computes it.
        chunk: Entries held at once.

    Returns:
        The scorer and the selection for `kept_chunks`, and statistics that it completes.

    Raises:
        ValueError: If a value is NaN or infinite.
    """
    found_mu, zeros = mean_magnitude(pair, chunk=chunk)
    scorer = Scorer(pair, rule, mu=found_mu if mu is None else mu, chunk=chunk)
    k = num_kept(pair.numel, keep)
    found = select(scorer, k if rule.masks else pair.numel)
    check_finite(pair, found_mu, found.energy, chunk=chunk)
    return scorer, found, describe(scorer, found, k=k, zeros=zeros)


def describe(scorer: Scorer, found: Selection, *, k: int, zeros: int) -> PruneStats:
    """Statistics of a selection, before anything is written."""
    numel = scorer.pair.numel
    return PruneStats(
        numel=numel,
        num_kept=k,
        mean_magnitude=scorer.mu,
        threshold=found.threshold.value,
        ties_taken=found.threshold.ties,
        path=found.path if scorer.rule.masks else "blend",
        positive_ratio=found.num_positive / max(numel, 1),
        num_zero_base=zeros,
        num_undefined=found.num_undefined,
        by_magnitude=scorer.by_magnitude and scorer.rule.method in ("fapm", "relative"),
    )


def check_finite(pair: Pair, mu: float, energy: float, *, chunk: int) -> None:
    """Refuse a tensor whose sums say that some value is NaN or infinite.

    Args:
        pair: The tensor, walked through again only to count what is wrong.
        mu: Its mean magnitude.
        energy: Squared norm of its task vector.
        chunk: Entries read at once.

    Raises:
        ValueError: If a sum is not finite.
    """
    if math.isfinite(mu) and math.isfinite(energy):
        return
    bad = [0, 0, 0]
    for start, stop in chunks(pair.numel, chunk):
        w_N, ft_N = (x.float() for x in pair.read(start, stop))
        for index, x_N in enumerate((w_N, ft_N, ft_N - w_N)):
            bad[index] += int((~torch.isfinite(x_N)).sum())
    if not any(bad):
        raise ValueError(
            "the squared norm of the task vector overflows fp32: the two tensors are not of one model."
        )
    raise ValueError(
        f"NaN or inf among the values: {bad[0]} pre-trained, {bad[1]} fine-tuned, {bad[2]} differences. "
        "A diverged training cannot be pruned; take an earlier checkpoint."
    )


def kept_chunks(
    scorer: Scorer, found: Selection, stats: PruneStats, *, keep: float, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor, np.ndarray]]:
    """The output of a tensor chunk by chunk; completes ``stats`` at the end.

    Every entry is bit-equal to the pre-trained or to the fine-tuned one (cast to ``dtype``): a choice instead
    of a sum, so that no rounding is added. DARE and WiSE-FT scale the difference and are summed in fp32.

    Args:
        scorer: Of `choose`.
        found: Of `choose`.
        stats: Of `choose`; moved, effective density and energy are filled in.
        keep: Share of entries kept; alpha for WiSE-FT.
        dtype: Of the output.

    Yields:
        Start, values (N,) and mask (N,) of each chunk; the values may share memory with the input.
    """
    pair, scale = scorer.pair, scorer.rule.scale(keep)
    moved = effective = 0
    energy = 0.0
    for start, mask_N in masks(scorer, found):
        w_N, ft_N = pair.read(start, start + len(mask_N))
        if scale == 1.0 and w_N.dtype == ft_N.dtype == dtype:
            out_N, num_moved, num_effective = _choose_bits(w_N, ft_N, mask_N)
        else:
            base_N = w_N.to(dtype)
            target_N = ft_N.to(dtype) if scale == 1.0 else _moved_part(w_N, ft_N, scale).to(dtype)
            out_N = torch.where(torch.from_numpy(mask_N), target_N, base_N)
            num_moved = int(torch.count_nonzero(w_N.float() != ft_N.float()))
            num_effective = int(torch.count_nonzero(out_N != base_N))
        difference_N = out_N.float() - w_N.float()
        energy += float(torch.dot(difference_N, difference_N))
        moved, effective = moved + num_moved, effective + num_effective
        yield start, out_N, mask_N
    stats.moved_ratio, stats.effective_density = moved / max(pair.numel, 1), effective / max(pair.numel, 1)
    # Nothing moved: all of nothing is kept.
    stats.kept_energy = energy / found.energy if found.energy else 1.0


def _moved_part(w_N: Tensor, ft_N: Tensor, scale: float) -> Tensor:
    base_N = w_N.float()
    return base_N + scale * (ft_N.float() - base_N)


def _choose_bits(w_N: Tensor, ft_N: Tensor, mask_N: np.ndarray) -> tuple[Tensor, int, int]:
    """``where(M, W', W)`` as W ^ ((W ^ W') & M) on the stored bits: ten times the speed of a branch."""
    kind = _BITS[w_N.element_size()]
    view = {2: torch.uint16, 4: torch.uint32, 8: torch.uint64}[w_N.element_size()]
    base_N = w_N.view(view).numpy()
    flip_N = np.bitwise_xor(base_N, ft_N.view(view).numpy())
    moved = int(np.count_nonzero(flip_N))
    flip_N *= mask_N.astype(kind)
    effective = int(np.count_nonzero(flip_N))
    np.bitwise_xor(flip_N, base_N, out=flip_N)
    return torch.from_numpy(flip_N).view(w_N.dtype), moved, effective


def fapm_prune_tensor(
    w_pre: Tensor,
    w_ft: Tensor,
    *,
    keep: float = 0.1,
    method: Method = "fapm",
    coefficient: float = 1.0,
    mu: float | None = None,
    seed: int = 0,
    out_dtype: torch.dtype | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, PruneStats]:
    """Keep what moved much, yet little relative to its weight; restore the rest of a fine-tuned tensor.

    Score ``S = |dW| - c * mu * (|dW| / |W|)`` with ``dW = W' - W`` and ``mu = mean|W|``; the
    ``int(n * keep)`` largest take the fine-tuned value, all others the pre-trained one. No gradient flows.

    Args:
        w_pre: Pre-trained tensor W, any shape, float; scores are computed in fp32.
        w_ft: Fine-tuned tensor W' of the same shape; its dtype may differ.
        keep: Share of entries kept, in [0, 1]; for ``wise_ft`` the weight alpha of the fine-tuned model.
        method: ``fapm``; or, to compare with, ``magnitude`` (and ``ties``, the same on one tensor: largest
            \\|dW\\|), ``relative`` (smallest \\|dW\\|/\\|W\\|), ``dare`` (random, rescaled by 1/keep),
            ``wise_ft`` (interpolation).
        coefficient: c; 1 is the paper.
        mu: Takes the place of the mean magnitude.
        seed: Of DARE.
        out_dtype: Of the result; None keeps that of ``w_pre``.
        chunk: Entries held in fp32 at once.

    Returns:
        The pruned tensor on the CPU, in the shape of ``w_pre``, and what was kept.

    Raises:
        ValueError: If shapes differ, ``keep`` is no share, the method is unknown, or a value is not finite.
        TypeError: If a tensor is not of a float dtype.

    Source: FAPM, arXiv 2509.08255 and the authors' script; of equal scores the lowest flat index wins, and
    0/0 ranks last instead of first.
    """
    check_keep(keep)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}.")
    if w_pre.shape != w_ft.shape:
        raise ValueError(
            f"both tensors must have one shape; got {tuple(w_pre.shape)} and {tuple(w_ft.shape)}. "
            "Are they of one model?"
        )
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 entry; got {chunk}.")
    for name, tensor in (("w_pre", w_pre), ("w_ft", w_ft)):
        if tensor.dtype not in FLOATS:
            raise TypeError(
                f"{name} must be a float tensor; got {tensor.dtype}. Dequantise the checkpoint first."
            )
    pair = TensorPair(w_pre.cpu(), w_ft.cpu())
    rule = Rule(method, coefficient, seed)
    dtype = out_dtype or w_pre.dtype
    scorer, found, stats = choose(pair, keep, rule=rule, mu=mu, chunk=chunk)
    out = torch.empty(pair.numel, dtype=dtype)
    for start, out_N, _ in kept_chunks(scorer, found, stats, keep=keep, dtype=dtype):
        out[start : start + out_N.numel()] = out_N
    return out.view(w_pre.shape), stats
