"""The one-run bound against the paper's listing with exact binomials, its limits, and its honesty."""

import math

import numpy as np
import pytest

from hf_plugins.dp.one_run_audit import audit_scores, binomial_tail_terms, epsilon_lower_bound, p_value
from tests.hf_plugins.dp import reference


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize(
    ("m", "r", "v"), [(10, 10, 10), (50, 20, 15), (100, 40, 20), (7, 5, 0), (300, 100, 93)]
)
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_p_value_equals_the_listing(m: int, r: int, v: int, epsilon: float, delta: float) -> None:
    ours = p_value(num_canaries=m, num_guesses=r, num_correct=v, epsilon=epsilon, delta=delta)
    assert ours == pytest.approx(reference.audit_p_value(m, r, v, epsilon, delta), rel=1e-9, abs=1e-15)


def test_all_right_by_hand() -> None:
    """r of r right: refuted while (e^eps / (1 + e^eps))^r < 0.05, so eps = ln(p / (1 - p)), p = .05^(1/r)."""
    p = 0.05 ** (1 / 100)
    bound = epsilon_lower_bound(num_canaries=100, num_guesses=100, num_correct=100, delta=0.0)
    assert bound == pytest.approx(math.log(p / (1 - p)), abs=1e-6)


def test_half_right_shows_nothing() -> None:
    assert epsilon_lower_bound(num_canaries=100, num_guesses=100, num_correct=50, delta=0.0) == 0


def test_bound_grows_with_hits_and_falls_with_delta() -> None:
    bounds = [
        epsilon_lower_bound(num_canaries=200, num_guesses=200, num_correct=v, delta=0.0)
        for v in (130, 160, 195)
    ]
    assert bounds[0] < bounds[1] < bounds[2]
    loose = epsilon_lower_bound(num_canaries=200, num_guesses=200, num_correct=195, delta=1e-3)
    assert loose < bounds[2]


def test_terms_are_a_distribution() -> None:
    terms = binomial_tail_terms(300, 0.7)
    assert terms.sum() == pytest.approx(1)
    assert (terms * np.arange(301)).sum() == pytest.approx(210)


def test_randomised_response_is_never_refuted_beyond_its_epsilon() -> None:
    """Scores that tell the coin with probability e/(1+e) have epsilon exactly 1.

    A bound at confidence 0.95 exceeds it in 5 % of runs at most; with 200 runs more than 26 excesses have
    probability below 1e-6 (mean 10, binomial tail).
    """
    rng = np.random.default_rng(0)
    excess, bounds = 0, []
    for _ in range(200):
        truth = rng.random(600) < 0.5
        told = np.where(rng.random(600) < math.e / (1 + math.e), truth, ~truth)
        result = audit_scores(told + rng.random(600) / 2, truth, delta=0.0, num_guesses=600)
        bounds.append(result.epsilon_lower_bound)
        excess += result.epsilon_lower_bound > 1
    assert excess <= 26
    assert np.median(bounds) > 0.7


def test_guesses_are_the_extremes() -> None:
    """Six canaries, one guess on either side by default: highest in, lowest out, the middle abstains."""
    result = audit_scores([9, 1, 5, 5, 5, 5], [True, False, False, False, True, True], delta=0.0)
    assert (result.num_guesses, result.num_correct, result.num_canaries) == (2, 2, 6)
    wrong = audit_scores([9, 1, 5, 5, 5, 5], [False, True, False, False, True, True], delta=0.0)
    assert wrong.num_correct == 0


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="0 <= num_correct <= num_guesses <= num_canaries"):
        p_value(num_canaries=5, num_guesses=6, num_correct=1, epsilon=1, delta=0)
    with pytest.raises(ValueError, match="two lists of one length"):
        audit_scores([1, 2], [True], delta=0)
    with pytest.raises(ValueError, match="num_guesses must be even and lie in 2"):
        audit_scores([1, 2, 3], [True, False, True], delta=0, num_guesses=3)
