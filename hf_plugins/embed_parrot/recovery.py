"""How much of a text was recovered: measures that are right for Chinese and English, with intervals."""

# Shapes: plain lists of token ids and strings; numpy only in the bootstrap.
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

# One CJK character is a unit of its own; anything else goes by words and single signs. A tokenizer made for
# English drops every other script, and two equal Chinese sentences would then score 0.
_CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3040-\u30ff\uac00-\ud7af\U00020000-\U0002fa1f"
_UNITS = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+|[^\w\s]|_")


class Interval(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def text_units(text: str) -> list[str]:
    """Lower-case words, single signs, and single characters of scripts without spaces."""
    return _UNITS.findall(text.lower())


def token_matches(
    truth: Sequence[int], guess: Sequence[int], *, ignore: frozenset[int] = frozenset()
) -> tuple[int, int]:
    """Positions where the right token was guessed, and positions counted.

    Args:
        truth: Right ids.
        guess: Guessed ids, one for each.
        ignore: Ids (padding, separators) whose positions do not count.

    Returns:
        ``(hits, counted)``.

    Raises:
        ValueError: If the lengths differ.
    """
    if len(truth) != len(guess):
        raise ValueError(
            f"token accuracy compares position by position; got {len(truth)} right and {len(guess)} "
            f"guessed tokens."
        )
    pairs = [(a, b) for a, b in zip(truth, guess, strict=True) if a not in ignore]
    return sum(a == b for a, b in pairs), len(pairs)


def multiset_f1(truth: Sequence[object], guess: Sequence[object]) -> float:
    """F1 of two bags with counts, in [0, 1]: order does not matter, repetition does.

    Returns:
        1 for two empty bags, 0 if only one is empty.
    """
    if not truth and not guess:
        return 1.0
    common = sum((Counter(truth) & Counter(guess)).values())
    return 2 * common / (len(truth) + len(guess))


def rouge_n(truth: str, guess: str, n: int) -> float:
    """ROUGE-N F1 over `text_units`, in [0, 1]; 0 where one side has no n-gram, 1 where both have none and
    the texts are equal.
    """
    a, b = (
        [tuple(u[i : i + n]) for i in range(len(u) - n + 1)] for u in (text_units(truth), text_units(guess))
    )
    if not a or not b:
        return float(text_units(truth) == text_units(guess))
    return multiset_f1(a, b)


def rouge_l(truth: str, guess: str) -> float:
    """ROUGE-L F1 over `text_units`: longest common subsequence, in [0, 1]."""
    a, b = text_units(truth), text_units(guess)
    if not a or not b:
        return float(a == b)
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(a) + len(b))


def bleu(truths: Sequence[str], guesses: Sequence[str], *, max_order: int = 4) -> float:
    """Corpus BLEU over `text_units`, in [0, 100].

    Orders that no pair is long enough for are left out, so that a pair of equal short sentences scores 100.

    Args:
        truths: References, one for each guess.
        guesses: Recovered texts.
        max_order: Longest n-gram.

    Returns:
        0 if nothing longer than nothing matches.
    """
    pairs = [(text_units(a), text_units(b)) for a, b in zip(truths, guesses, strict=True)]
    logs = []
    for n in range(1, max_order + 1):
        hits = total = possible = 0
        for a, b in pairs:
            grams = [Counter(tuple(u[i : i + n]) for i in range(len(u) - n + 1)) for u in (a, b)]
            hits += sum((grams[0] & grams[1]).values())
            total += max(0, len(b) - n + 1)
            possible += max(0, len(a) - n + 1)
        if possible == 0:
            break
        if hits == 0:
            return 0.0
        logs.append(math.log(hits / total))
    if not logs:
        return 0.0
    length_a, length_b = (sum(len(pair[side]) for pair in pairs) for side in (0, 1))
    brevity = min(0.0, 1 - length_a / length_b)
    return 100 * math.exp(sum(logs) / len(logs) + brevity)


def entity_recall(entities: Sequence[str], guess: str) -> float:
    """Share of given strings (names, numbers, addresses) that stand in the recovered text, spaces and case
    aside; NaN without any.
    """
    if not entities:
        return math.nan
    plain = "".join(guess.lower().split())
    return sum("".join(entity.lower().split()) in plain for entity in entities) / len(entities)


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float], num_items: int, *, num_samples: int = 1000, seed: int = 0
) -> Interval:
    """Percentile bootstrap over whole texts, because the tokens of one text stand or fall together.

    Args:
        statistic: Maps an array of item numbers, repeats included, to the figure.
        num_items: Number of texts.
        num_samples: Resamples.
        seed: Of the resampling.

    Returns:
        The figure on all items, and the 2.5 % and 97.5 % points.

    Raises:
        ValueError: If there is no item.
    """
    if num_items < 1:
        raise ValueError("an interval needs at least one text; got none.")
    rng = np.random.default_rng(seed)
    draws = [statistic(rng.integers(0, num_items, num_items)) for _ in range(num_samples)]
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return Interval(statistic(np.arange(num_items)), float(low), float(high))
