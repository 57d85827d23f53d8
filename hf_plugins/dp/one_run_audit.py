"""Lower bound on epsilon from one training run: many canaries, each in or out by a coin, then guesses."""

# Shapes: M canaries, each put in with probability 1/2 on its own.

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """What one audit has shown."""

    epsilon_lower_bound: float
    """True epsilon is at least this with the given confidence; 0 if nothing could be shown."""
    num_guesses: int
    """Guesses made (the rest abstained)."""
    num_correct: int
    """How many were right."""
    num_canaries: int
    """Canaries in all."""
    confidence: float
    """Probability, over the run, that the bound holds."""


def binomial_tail_terms(trials: int, probability: float) -> np.ndarray:
    """Probabilities of 0 .. ``trials`` successes, float64 ``[trials + 1]``.

    Args:
        trials: Number of trials, >= 0.
        probability: Chance of each, in (0, 1).

    Returns:
        The probability mass function, from logarithms so that no factor overflows.
    """
    k = np.arange(trials + 1)
    log_choose = np.array(
        [math.lgamma(trials + 1) - math.lgamma(i + 1) - math.lgamma(trials - i + 1) for i in k]
    )
    return np.exp(log_choose + k * math.log(probability) + (trials - k) * math.log1p(-probability))


def p_value(*, num_canaries: int, num_guesses: int, num_correct: int, epsilon: float, delta: float) -> float:
    """Probability that a mechanism with (epsilon, delta) lets this many guesses be right, at most.

    ``P[Binomial(r, e^eps / (1 + e^eps)) >= v] + 2 m delta max_i P[v - i <= Binomial(...) < v] / i``

    Args:
        num_canaries: m.
        num_guesses: r, the guesses made.
        num_correct: v, the right ones.
        epsilon: Claim under test, >= 0.
        delta: Its delta, in [0, 1).

    Returns:
        The bound, in [0, 1].

    Raises:
        ValueError: If the counts are not ordered v <= r <= m.

    Source: Steinke, Nasr, Jagielski 2023 (arXiv 2305.08846), Theorem 5.2 and Appendix D.
    """
    if not 0 <= num_correct <= num_guesses <= num_canaries:
        raise ValueError(
            "an audit needs 0 <= num_correct <= num_guesses <= num_canaries; got "
            f"{num_correct}, {num_guesses}, {num_canaries}."
        )
    mass = binomial_tail_terms(num_guesses, 1 / (1 + math.exp(-epsilon)))
    tail = float(mass[num_correct:].sum())
    below = np.cumsum(mass[:num_correct][::-1])
    alpha = float((below / np.arange(1, num_correct + 1)).max()) if num_correct else 0.0
    return min(1.0, tail + 2 * num_canaries * delta * alpha)


def epsilon_lower_bound(
    *, num_canaries: int, num_guesses: int, num_correct: int, delta: float, confidence: float = 0.95
) -> float:
    """Largest epsilon that the guesses refute, found by bisection.

    Args:
        num_canaries: As in `p_value`.
        num_guesses: As in `p_value`.
        num_correct: As in `p_value`.
        delta: As in `p_value`.
        confidence: Probability that the bound holds.

    Returns:
        Epsilon >= 0 whose p-value is 1 - ``confidence``; 0 if even epsilon 0 is not refuted.
    """

    def refuted(value: float) -> bool:
        return (
            p_value(
                num_canaries=num_canaries,
                num_guesses=num_guesses,
                num_correct=num_correct,
                epsilon=value,
                delta=delta,
            )
            < 1 - confidence
        )

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high) and high < 64:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def audit_scores(
    scores_M: Sequence[float],
    included_M: Sequence[bool],
    *,
    delta: float,
    num_guesses: int | None = None,
    confidence: float = 0.95,
) -> AuditResult:
    """Guess membership from scores and bound epsilon from below.

    The canaries with the highest scores are guessed to be in, as many with the lowest to be out, the middle
    abstains. How many to guess must not be chosen by looking at the outcome, so it is fixed beforehand.

    Args:
        scores_M: Higher means more likely in the training data.
        included_M: The truth: fair coins, one for each canary, thrown before training.
        delta: Delta of the claim.
        num_guesses: Even number of guesses; default: a third of the canaries.
        confidence: Probability that the bound holds.

    Returns:
        The bound and what it rests on.

    Raises:
        ValueError: If scores and truth differ in number, or the number of guesses is not even and within it.

    Source: Steinke, Nasr, Jagielski 2023, Algorithm 1.
    """
    scores, included = np.asarray(scores_M, dtype=np.float64), np.asarray(included_M, dtype=bool)
    if scores.shape != included.shape or scores.ndim != 1:
        raise ValueError(
            f"scores and included must be two lists of one length; got shapes {scores.shape} and "
            f"{included.shape}."
        )
    guesses = 2 * (len(scores) // 6) if num_guesses is None else num_guesses
    if guesses % 2 or not 2 <= guesses <= len(scores):
        raise ValueError(
            f"num_guesses must be even and lie in 2 .. {len(scores)} (the canaries); got {guesses}."
        )
    order = np.argsort(scores, kind="stable")
    half = guesses // 2
    correct = int(included[order[-half:]].sum() + (~included[order[:half]]).sum())
    bound = epsilon_lower_bound(
        num_canaries=len(scores),
        num_guesses=guesses,
        num_correct=correct,
        delta=delta,
        confidence=confidence,
    )
    return AuditResult(
        epsilon_lower_bound=bound,
        num_guesses=guesses,
        num_correct=correct,
        num_canaries=len(scores),
        confidence=confidence,
    )
