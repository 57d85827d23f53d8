"""Scores of a strategy with their uncertainty: verdicts in both orders, intervals, early stopping, ranks."""

# Q questions.

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

MAX_UNPARSED = 0.05
_WORDS = {
    "win": ("win", "wins", "赢", "胜"),
    "tie": ("tie", "ties", "draw", "平", "平局"),
    "lose": ("lose", "loses", "loss", "输", "负"),
}
VALUES = {"win": 1, "tie": 0, "lose": -1}


@dataclass(frozen=True, kw_only=True)
class Score:
    """A score with its interval."""

    value: float
    """Mean over questions, rounded to four digits as the paper does."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    num_questions: int
    """Questions that count."""
    num_unparsed: int = 0
    """Questions left out because a verdict could not be read."""


def parse_verdict(text: str) -> str | None:
    """``win``, ``tie`` or ``lose`` of response 1, or None.

    Only a reply whose last line (after any ``</think>``) is the verdict word counts: a word somewhere in a
    sentence, such as "cannot win", does not.
    """
    body = text.rsplit("</think>", 1)[-1].strip()
    line = body.splitlines()[-1] if body else ""
    word = re.sub(r"[\s\"'`*{}\[\]【】().。!！,，]+", "", line).lower()
    word = re.sub(r"^(verdict|answer|结论|答案)[:：]", "", word)
    return next((verdict for verdict, words in _WORDS.items() if word in words), None)


def question_values(first: Sequence[str | None], second: Sequence[str | None]) -> np.ndarray:
    """Value of each question in {-1, -1/2, 0, 1/2, 1}; NaN where either verdict could not be read.

    A question with one readable order is left out whole: half of it would let the judge's preference for a
    place through.

    Args:
        first: Verdicts on (candidate, baseline), each of response 1, the candidate.
        second: Verdicts on (baseline, candidate), each of response 1, the baseline.

    Returns:
        (Q,) float64.

    Raises:
        ValueError: If the two orders do not pair.
    """
    if len(first) != len(second):
        raise ValueError(
            f"both orders need every question once; got {len(first)} and {len(second)} verdicts."
        )
    pairs = zip(first, second, strict=True)
    return np.array([math.nan if a is None or b is None else (VALUES[a] - VALUES[b]) / 2 for a, b in pairs])


def check_unparsed(values_Q: np.ndarray, limit: float = MAX_UNPARSED) -> int:
    """How many questions have no value.

    Raises:
        RuntimeError: If their share is above ``limit``: the score would rest on what the judge found easy.
    """
    missing = int(np.isnan(values_Q).sum())
    if missing > limit * len(values_Q):
        raise RuntimeError(
            f"{missing} of {len(values_Q)} verdicts could not be read, more than {limit:.0%}; ask the "
            "judge for one word (win, tie or lose) on its last line, or use another judge."
        )
    return missing


def standard_error(values_Q: np.ndarray) -> float:
    """Standard error of the mean; 0 for a single question."""
    count = len(values_Q)
    return float(values_Q.std(ddof=1) / math.sqrt(count)) if count > 1 else 0.0


def worst_case_error(num_questions: int, *, ties: float = 0.0) -> float:
    """Largest standard error of a score of values in [-1, 1], a share ``ties`` of them 0: ``sqrt((1 -
    ties) / Q)``.
    """
    return math.sqrt((1 - ties) / num_questions)


def bootstrap_score(
    values_Q: np.ndarray, *, level: float = 0.95, resamples: int = 2000, seed: int = 0, digits: int = 4
) -> Score:
    """Mean over questions with a percentile interval, resampling questions (paired: both models answer each).

    Args:
        values_Q: (Q,) values or differences; NaN is left out.
        level: Coverage of the interval.
        resamples: Bootstrap resamples.
        seed: Of the resampling.
        digits: To which the value is rounded.

    Returns:
        The score.

    Raises:
        ValueError: If no question has a value.
    """
    values = values_Q[~np.isnan(values_Q)]
    if len(values) == 0:
        raise ValueError("a score needs at least one question with a value; got none.")
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for start in range(0, resamples, 100):
        size = min(100, resamples - start)
        picks = generator.integers(0, len(values), size=(size, len(values)))
        means[start : start + size] = values[picks].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Score(
        value=round(float(values.mean()), digits),
        low=float(low),
        high=float(high),
        num_questions=len(values),
        num_unparsed=len(values_Q) - len(values),
    )


@dataclass(frozen=True, kw_only=True)
class StoppingRule:
    """When judging may stop early: the interval at one of a few looks lies below the incumbent's score.

    The error is spread over the looks (Bonferroni), so that a strategy as good as the incumbent is given up
    with probability ``alpha`` at most, whatever the number of looks; each look uses the normal interval with
    one win and one loss added, which keeps its width above 0 when all verdicts agree.
    """

    alpha: float = 0.05
    looks: tuple[int, ...] = (40, 80, 120, 160, 200, 240, 320)

    def bounds(self, values_Q: np.ndarray) -> tuple[float, float]:
        """The interval at one look."""
        padded = np.concatenate([values_Q[~np.isnan(values_Q)], [1.0, -1.0]])
        # One-sided: only a loss against the incumbent stops.
        half = NormalDist().inv_cdf(1 - self.alpha / len(self.looks)) * standard_error(padded)
        return float(padded.mean() - half), float(padded.mean() + half)

    def hopeless(self, values_Q: np.ndarray, incumbent: float) -> bool:
        """Whether the score lies below the incumbent's for sure."""
        return len(values_Q) in self.looks and self.bounds(values_Q)[1] < incumbent


def judge_until(
    ask: Callable[[range], np.ndarray], num_questions: int, *, rule: StoppingRule | None, incumbent: float
) -> np.ndarray:
    """Judge block by block until the rule stops or all questions are judged.

    Args:
        ask: Gives the values of a range of questions.
        num_questions: All there are.
        rule: None judges all of them.
        incumbent: Best score so far; ``-inf`` never stops.

    Returns:
        (n,) values of the first n questions, n being where it stopped.
    """
    stops = [look for look in (rule.looks if rule else ()) if look < num_questions] + [num_questions]
    values = np.empty(0)
    for stop in stops:
        values = np.concatenate([values, ask(range(len(values), stop))])
        if rule is not None and rule.hopeless(values, incumbent):
            break
    return values


def length_controlled(values_Q: np.ndarray, length_difference_Q: np.ndarray) -> float:
    """Score at equal length of both answers: intercept of the regression of the values on tanh of the
    standardised length difference. Judges like long answers; this tells how much of a score is length.
    """
    good = ~np.isnan(values_Q)
    values, lengths = values_Q[good], length_difference_Q[good].astype(float)
    spread = lengths.std()
    if len(values) < 3 or spread == 0:
        return float(values.mean())
    design = np.stack([np.ones(len(values)), np.tanh(lengths / spread)], axis=1)
    return float(np.linalg.lstsq(design, values, rcond=None)[0][0])


def kendall_tau(x: Sequence[float], y: Sequence[float]) -> float:
    """Kendall's tau-b of two lists of scores, ties taken into account; NaN if one list is constant.

    Raises:
        ValueError: If the lists do not pair.
    """
    if len(x) != len(y):
        raise ValueError(f"rank correlation needs two lists of one length; got {len(x)} and {len(y)}.")
    i, j = np.triu_indices(len(x), 1)
    a, b = (np.sign(np.asarray(v, float)[i] - np.asarray(v, float)[j]) for v in (x, y))
    scale = math.sqrt(float((a != 0).sum()) * float((b != 0).sum()))
    return float((a * b).sum() / scale) if scale else math.nan
