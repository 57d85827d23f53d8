"""Vocabulary matching: hidden states of a known causal model are its input, found token by token."""

# Shapes: N texts, T positions, D width, K candidates, B candidates of one block.
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# A runner-up at distance 0 is a twin of the best row; the ratio is then 1, not 0/0.
_TINY = 1e-30


class Prefix(Protocol):
    """What has been recovered so far, ready to be continued by any token."""

    def probe(self, rows_R: Tensor, candidates_RB: Tensor) -> Tensor:
        """Hidden states (R, B, D) of each candidate right after the prefix of its text ``rows_R``."""
        ...

    def accept(self, tokens_N: Tensor) -> None:
        """Make the prefix of each text one token longer."""
        ...


class VocabularyMatches(NamedTuple):
    """What was found, with the evidence for each token."""

    ids_NT: Tensor
    """Recovered tokens, int64; -1 where a text has ended."""
    best_NT: Tensor
    """Distance of the token taken, fp32."""
    ratio_NT: Tensor
    """Best over second-best distance in [0, 1]: near 0 the token is certain, near 1 it is a guess."""
    num_probes: int
    """Candidates run through the model."""
    num_widened: int
    """Positions whose ranking did not settle, so that the whole vocabulary was tried."""


class _Standing(NamedTuple):
    """Best and second-best candidate of each text so far."""

    ids_R: Tensor
    best_R: Tensor
    second_R: Tensor

    def pick(self, rows: Tensor) -> "_Standing":
        return _Standing(*(part[rows] for part in self))

    def put(self, rows: Tensor, other: "_Standing") -> None:
        for mine, theirs in zip(self, other, strict=True):
            mine[rows] = theirs


class _Search(NamedTuple):
    prefix: Prefix
    canonical: Callable[[Tensor], Tensor]
    block: int

    def improve(
        self, standing: _Standing, rows_R: Tensor, candidates_RK: Tensor, goal_RD: Tensor
    ) -> _Standing:
        """The standing after more candidates."""
        ids, distances = [standing.ids_R[:, None]], [standing.best_R[:, None]]
        for block_RB in candidates_RK.split(self.block, dim=1):
            hidden_RBD = self.canonical(self.prefix.probe(rows_R, block_RB).float())
            ids.append(block_RB)
            distances.append((hidden_RBD - goal_RD[:, None]).norm(dim=-1))
        ids_RK, distance_RK = torch.cat(ids, 1), torch.cat(distances, 1)
        best_R, place_R = distance_RK.min(1)
        ids_R = ids_RK.gather(1, place_R[:, None])[:, 0]
        # A token may come up twice; it must not be its own rival. A best one that falls is among the others.
        others_RK = distance_RK.masked_fill(ids_RK == ids_R[:, None], torch.inf)
        return _Standing(ids_R, best_R, torch.minimum(others_RK.min(1).values, standing.second_R))


def _stages(ranked_NTK: Tensor | None, first: int) -> list[slice]:
    """Parts of a ranking, each four times as long as all before it; the whole vocabulary follows."""
    bounds = [0]
    length = 0 if ranked_NTK is None else ranked_NTK.shape[2]
    while bounds[-1] < length:
        bounds.append(min(length, max(first, 4 * bounds[-1])))
    return [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]


def match_vocabulary(
    prefix: Prefix,
    target_NTD: Tensor,
    lengths_N: Tensor,
    *,
    vocab_size: int,
    ranked_NTK: Tensor | None = None,
    first: int = 50,
    settle_ratio: float = 0.05,
    settle_distance: float = 0.0,
    block: int = 512,
    canonical: Callable[[Tensor], Tensor] = lambda x: x,
) -> VocabularyMatches:
    """Recover texts from the hidden states of a causal model that the attacker can run.

    For t = 0, 1, ...: run candidates v after the recovered prefix and take
    ``argmin_v ||f(x_<t, v)[t] - H[t]||``. Exact up to rounding, because f is injective almost surely.

    Args:
        prefix: The empty prefix of N texts in the attacker's copy of the model.
        target_NTD: Observed states (N, T, D); rows past a text's length are not looked at.
        lengths_N: Tokens of each text, int64.
        vocab_size: Size of the vocabulary.
        ranked_NTK: Candidates of each position, best first, from a cheaper attack; they are tried in growing
            parts until one stands out, and the whole vocabulary after them. Without it all tokens are tried.
        first: Size of the first part.
        settle_ratio: A candidate stands out if its distance is at most this share of the next one's.
        settle_distance: It also does if its distance is at most this, for example the length of known noise.
        block: Candidates run at once for each text; bounds memory.
        canonical: Maps states to what a defence cannot hide, on both sides.

    Returns:
        Tokens, distances, ratios and the work done.

    Raises:
        ValueError: If the batch is empty, a length is out of range, or a state is not finite.

    Source: SIPIT, arXiv 2510.15511, and arXiv 2505.18332; the ranking, the shared prefix and the batching
    are ours.
    """
    num_texts, num_positions = target_NTD.shape[:2]
    if num_texts == 0 or int(lengths_N.min()) < 1 or int(lengths_N.max()) > num_positions:
        raise ValueError(
            f"vocabulary matching needs at least one text with 1 .. {num_positions} tokens each; got lengths "
            f"{lengths_N.tolist()}."
        )
    inside_NT = torch.arange(num_positions) < lengths_N[:, None]
    if not torch.isfinite(target_NTD[inside_NT]).all():
        raise ValueError("observed hidden states hold NaN or infinity; nothing can be matched against them.")
    target_NTD = canonical(target_NTD.float())
    ids_NT = torch.full((num_texts, num_positions), -1)
    best_NT = torch.full((num_texts, num_positions), torch.nan)
    ratio_NT = best_NT.clone()
    search = _Search(prefix, canonical, block)
    everything_1V = torch.arange(vocab_size)[None]
    stages = _stages(ranked_NTK, first)
    num_probes = num_widened = 0
    for t in range(int(lengths_N.max())):
        rows_R = inside_NT[:, t].nonzero()[:, 0]
        goal_RD = target_NTD[rows_R, t]
        unknown_R = torch.full((len(rows_R),), torch.inf)
        standing = _Standing(torch.full((len(rows_R),), -1), unknown_R, unknown_R.clone())
        open_R = torch.arange(len(rows_R))
        for stage in [*stages, None]:
            rows = rows_R[open_R]
            if stage is None:
                candidates = everything_1V.expand(len(rows), -1)
                num_widened += len(rows) if stages else 0
            else:
                assert ranked_NTK is not None, "stages are parts of a ranking"
                candidates = ranked_NTK[rows, t, stage]
            found = search.improve(standing.pick(open_R), rows, candidates, goal_RD[open_R])
            standing.put(open_R, found)
            num_probes += candidates.numel()
            settled = (found.best_R <= settle_ratio * found.second_R) | (found.best_R <= settle_distance)
            open_R = open_R[~settled]
            if len(open_R) == 0:
                break
        ids_R, best_R, second_R = standing
        ids_NT[rows_R, t] = ids_R
        best_NT[rows_R, t] = best_R
        ratio_NT[rows_R, t] = (best_R / second_R.clamp_min(_TINY)).clamp_max(1)
        # Texts that have ended are continued by token 0; nothing of it is read.
        prefix.accept(ids_NT[:, t].clamp_min(0))
    return VocabularyMatches(ids_NT, best_NT, ratio_NT, num_probes, num_widened)
