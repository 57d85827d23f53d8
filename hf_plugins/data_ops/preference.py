"""Preference pairs: sample responses, vote, remove noise by an ensemble of reward models."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from datasets import Dataset, Value

from hf_plugins.data_ops.answers import ask
from hf_plugins.data_ops.chat import Messages, Sampling
from hf_plugins.data_ops.llm_ops import CHUNK, set_column
from hf_plugins.data_ops.op import ROW_ID, DataOp, OpContext, digest, register, select_rows
from hf_plugins.data_ops.prompts import VOTE, check_lang, templates, vote_messages
from hf_plugins.data_ops.text import join_text


class Verdict(NamedTuple):
    """Outcome of a vote."""

    best: int
    worst: int
    how: str
    """``majority`` or ``borda``."""


def tally(votes: Sequence[tuple[int, int]], num_responses: int) -> Verdict | None:
    """Best and worst response by majority; where there is none, by Borda sums; None if both fall together.

    A voter's ranking knows three places: its best has 2 points, its worst 0, the others 1. Ties of the sums
    go to the lower index.

    Args:
        votes: (best, worst) of each voter.
        num_responses: Number of responses.

    Returns:
        The verdict, or None without votes or if best equals worst.
    """
    votes = [vote for vote in votes if vote[0] != vote[1]]
    if not votes:
        return None
    points = [
        sum(2 if best == i else 0 if worst == i else 1 for best, worst in votes) for i in range(num_responses)
    ]
    chosen, how = [], "majority"
    for place, prefer in ((0, max), (1, min)):
        winner, count = Counter(vote[place] for vote in votes).most_common(1)[0]
        if 2 * count <= len(votes):
            winner, how = points.index(prefer(points)), "borda"
        chosen.append(winner)
    return None if chosen[0] == chosen[1] else Verdict(chosen[0], chosen[1], how)


def ensemble_distance(margins_RN: np.ndarray) -> np.ndarray:
    """Mean margin of each pair over reward models: ``d_i = 1/N sum_n [r_n(x_i, y_c) - r_n(x_i, y_r)]``.

    Args:
        margins_RN: Margins, (rows, models); NaN where a model did not score a row (cross-fitting).

    Returns:
        Distances (rows,), float64.

    Raises:
        ValueError: If a row has no margin at all or an infinite one.

    Source: DPF-CM, arXiv 2509.01354, eq. (2).
    """
    margins = np.asarray(margins_RN, dtype=np.float64)
    if margins.ndim != 2:
        raise ValueError(
            f"margins must be rows x models; got shape {margins.shape}. Reshape one model's to (rows, 1)."
        )
    empty = np.isnan(margins).all(axis=1)
    if empty.any() or np.isinf(margins).any():
        raise ValueError(
            f"{int(empty.sum())} pairs have no margin and {int(np.isinf(margins).sum())} margins are "
            "infinite; score every pair with at least one reward model before denoising."
        )
    return np.nanmean(margins, axis=1)


def trim_ranks(distances_R: np.ndarray, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the ``floor(low * R)`` smallest and ``floor(high * R)`` largest distances; ties by place.

    Raises:
        ValueError: If the shares are not in [0, 1] together.
    """
    if not (0 <= low and 0 <= high and low + high <= 1):
        raise ValueError(
            f"trim shares must be >= 0 and sum to at most 1; got {low:g} and {high:g}. Write 0.1 for 10 %."
        )
    order = np.argsort(distances_R, kind="stable")
    # 0.1 * 30 is 3.0000000000000004 in some orders and 2.9999999999999996 in others.
    num_low, num_high = (int(np.floor(share * len(order) + 1e-9)) for share in (low, high))
    return order[:num_low], order[len(order) - num_high :]


@register
@dataclass(frozen=True, kw_only=True)
class ResponseSamplingMapper(DataOp):
    """Samples responses to each prompt from the policy model into the column ``responses``."""

    name: ClassVar[str] = "response_sampling_mapper"
    roles: ClassVar[tuple[str, ...]] = ("policy",)
    prompt_key: str = "prompt"
    num_responses: int = 5
    temperature: float = 0.8
    top_p: float = 0.95
    max_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_responses < 2:
            raise ValueError(
                f"{self.name}: num_responses must be >= 2 to compare any; got {self.num_responses}."
            )

    def columns(self) -> tuple[str, ...]:
        """The prompt."""
        return (self.prompt_key,)

    def apply(self, dataset: Dataset, context: OpContext) -> Dataset:
        """Ask the policy."""
        sampling = Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            max_tokens=self.max_tokens,
            n=self.num_responses,
            seed=self.seed,
        )
        asked = [_conversation(prompt) for prompt in dataset[self.prompt_key]]
        found: list[list[str]] = []
        for start in range(0, len(asked), CHUNK):
            found += context.client("policy").complete_many(asked[start : start + CHUNK], sampling=sampling)
            if context.progress:
                context.progress(self.name, len(found), len(asked))
        return set_column(dataset, "responses", found)


def _conversation(prompt: Any) -> Messages:
    return (
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    )


@register
@dataclass(frozen=True, kw_only=True)
class PreferenceVoteMapper(DataOp):
    """Turns ``responses`` into ``chosen`` and ``rejected`` by the votes of several language models.

    Each voter sees the responses in an order of its own (seeded), so that a liking for the first place does
    not add up. Rows without a verdict are dropped.
    """

    name: ClassVar[str] = "preference_vote_mapper"
    prompt_key: str = "prompt"
    responses_key: str = "responses"
    voters: tuple[str, ...] = ("voter_1", "voter_2", "voter_3")
    """Roles of the voting clients."""
    seed: int = 0
    lang: Literal["zh", "en"] = "zh"

    def __post_init__(self) -> None:
        check_lang(self.name, self.lang)
        if not self.voters:
            raise ValueError(f"{self.name}: voters is empty; name at least one role.")

    @property
    def roles(self) -> tuple[str, ...]:  # type: ignore[override]
        """The voters."""
        return self.voters

    def columns(self) -> tuple[str, ...]:
        """Prompt and responses."""
        return self.prompt_key, self.responses_key

    def prompts(self) -> tuple[str, ...]:
        """Words of the voters' prompt."""
        return templates("vote")

    def _orders(self, row_id: str, voter: str, count: int) -> list[int]:
        order = list(range(count))
        random.Random(digest(str(self.seed), voter, row_id)).shuffle(order)
        return order

    def apply(self, dataset: Dataset, context: OpContext) -> Dataset:
        """Ask the voters, count, keep rows with a verdict."""
        ids, prompts = list(dataset[ROW_ID]), [join_text(p) for p in dataset[self.prompt_key]]
        responses = [list(row) for row in dataset[self.responses_key]]
        votes: list[list[tuple[int, int]]] = [[] for _ in ids]
        for voter in self.voters:
            orders = [self._orders(i, voter, len(r)) for i, r in zip(ids, responses, strict=True)]
            asked = [
                vote_messages(prompts[i], [responses[i][k] for k in orders[i]], self.lang)
                for i in range(len(ids))
            ]
            replies = ask(context.client(voter), asked, VOTE, sampling=Sampling(max_tokens=256))
            for index, reply in enumerate(replies):
                order, value = orders[index], reply.value
                if value is None or max(value["best"], value["worst"]) > len(order):
                    problem = reply.problem or "a number beyond the responses"
                    context.ledger.add(self.name, ids[index], "flagged", f"{voter} unparsed: {problem[:150]}")
                    continue
                votes[index].append((order[value["best"] - 1], order[value["worst"] - 1]))
        verdicts = [tally(v, len(r)) for v, r in zip(votes, responses, strict=True)]
        for name, place in (("chosen", 0), ("rejected", 1)):
            texts = [
                None if v is None else r[int(v[place])] for v, r in zip(verdicts, responses, strict=True)
            ]
            dataset = set_column(dataset, name, texts, Value("string"))
        reasons = [None if verdict else "no best and worst that differ" for verdict in verdicts]
        return select_rows(dataset, reasons, context, self.name)


@register
@dataclass(frozen=True, kw_only=True)
class PreferenceDenoiseFilter(DataOp):
    """Removes the pairs with the smallest and the largest ensemble distance (rank based).

    ``action`` says what happens to the smallest, which are probably flipped: ``drop`` (the paper), ``flip``
    (swap chosen and rejected where the distance is negative, drop the others), ``label_smooth`` (keep them,
    with the share ``smoothing`` in the column ``label_smoothing``). The largest are always dropped.
    """

    name: ClassVar[str] = "preference_denoise_filter"
    idempotent: ClassVar[bool] = False
    margins_key: str = "rm_margins"
    """Column of lists: each reward model's margin, null where a model did not score the row."""
    chosen_key: str = "chosen"
    rejected_key: str = "rejected"
    trim_low: float = 0.1
    trim_high: float = 0.1
    action: Literal["drop", "flip", "label_smooth"] = "drop"
    smoothing: float = 0.4

    def __post_init__(self) -> None:
        trim_ranks(np.zeros(0), self.trim_low, self.trim_high)
        if self.action not in ("drop", "flip", "label_smooth"):
            raise ValueError(f"{self.name}: action must be drop, flip or label_smooth; got {self.action!r}.")
        if not 0 < self.smoothing <= 0.5:
            raise ValueError(
                f"{self.name}: smoothing must lie in (0, 0.5]; got {self.smoothing}. 0.5 says nothing is "
                "known."
            )

    def columns(self) -> tuple[str, ...]:
        """Margins and the pair."""
        return self.margins_key, self.chosen_key, self.rejected_key

    def apply(self, dataset: Dataset, context: OpContext) -> Dataset:
        """Rank by distance, drop, flip or soften the ends; the column ``rm_distance`` is added."""
        if not len(dataset):
            return dataset
        margins = np.array(
            [[np.nan if m is None else m for m in row] for row in dataset[self.margins_key]], dtype=np.float64
        )
        distance = ensemble_distance(margins)
        low, high = (set(part.tolist()) for part in trim_ranks(distance, self.trim_low, self.trim_high))
        ids, chosen, rejected = (list(dataset[k]) for k in (ROW_ID, self.chosen_key, self.rejected_key))
        smoothing = [0.0] * len(ids)
        reasons: list[str | None] = [None] * len(ids)
        for index, value in enumerate(distance.tolist()):
            if index in high:
                reasons[index] = f"distance {value:.4g} among the largest {self.trim_high:g}"
            elif index in low and self.action == "label_smooth":
                smoothing[index] = self.smoothing
                context.ledger.add(self.name, ids[index], "changed", "label smoothed", value)
            elif index in low and self.action == "flip" and value < 0:
                chosen[index], rejected[index] = rejected[index], chosen[index]
                context.ledger.add(self.name, ids[index], "changed", "flipped", value)
            elif index in low:
                reasons[index] = f"distance {value:.4g} among the smallest {self.trim_low:g}"
        dataset = set_column(dataset, "rm_distance", distance.tolist())
        if self.action == "flip":
            dataset = set_column(dataset, self.chosen_key, chosen, dataset.features[self.chosen_key])
            dataset = set_column(dataset, self.rejected_key, rejected, dataset.features[self.rejected_key])
        if self.action == "label_smooth":
            dataset = set_column(dataset, "label_smoothing", smoothing)
        return select_rows(dataset, reasons, context, self.name, distance.tolist())
