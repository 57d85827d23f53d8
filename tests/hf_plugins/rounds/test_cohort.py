"""Cohorts: the law that the accountant assumes, and repeatability."""

import pytest

from hf_plugins.rounds import Sampling, generator_for, seed_for


def test_poisson_draws_each_client_independently() -> None:
    """2,000 rounds of 50 clients at 0.1: mean size 5, variance 4.5; a fixed size would have variance 0.

    Standard errors: of the mean 0.047, of the variance about 0.15; six of each are allowed (false alarm
    below 1e-8).
    """
    sampling = Sampling(mode="poisson", rate=0.1)
    sizes = [len(sampling.draw(range(50), seed=0, round_index=r)) for r in range(2000)]
    mean = sum(sizes) / len(sizes)
    variance = sum((s - mean) ** 2 for s in sizes) / len(sizes)
    assert abs(mean - 5) < 6 * 0.047
    assert abs(variance - 4.5) < 6 * 0.15
    assert min(sizes) == 0, "an empty cohort happens about 10 times in 2,000 rounds"


def test_fixed_and_all() -> None:
    fixed = Sampling(mode="fixed", size=3)
    draws = [fixed.draw(range(10), seed=1, round_index=r) for r in range(40)]
    assert all(len(set(d)) == 3 and d == sorted(d) for d in draws)
    assert {i for d in draws for i in d} == set(range(10))
    assert Sampling().draw([3, 1, 2], seed=0, round_index=0) == [1, 2, 3]
    assert fixed.expected_size(10) == 3
    assert Sampling(mode="poisson", rate=0.25).expected_size(8) == 2
    assert Sampling().expected_size(8) == 8


def test_draws_are_functions_of_seed_and_round() -> None:
    sampling = Sampling(mode="poisson", rate=0.5)
    first = [sampling.draw(range(40), seed=5, round_index=r) for r in range(3)]
    assert first == [sampling.draw(range(40), seed=5, round_index=r) for r in range(3)]
    assert first[0] != first[1]
    assert first[0] != sampling.draw(range(40), seed=6, round_index=0)


@pytest.mark.parametrize("mode", ["poisson", "fixed"])
def test_secure_draws_do_not_follow_the_seed(mode: str) -> None:
    """100 clients: two equal draws by chance have a probability below 1e-25."""
    sampling = Sampling(mode=mode, rate=0.5, size=50, secure=True)
    draws = [sampling.draw(range(100), seed=0, round_index=0) for _ in range(2)]
    assert draws[0] != draws[1]
    assert 10 < len(draws[0]) < 90


def test_refusals() -> None:
    with pytest.raises(ValueError, match="sampling mode must be one of"):
        Sampling(mode="shuffle")
    with pytest.raises(ValueError, match="It is a share: write 0.1 for 10 %"):
        Sampling(mode="poisson", rate=10)
    with pytest.raises(ValueError, match="fixed sampling needs size >= 1"):
        Sampling(mode="fixed")
    with pytest.raises(ValueError, match="clients a round are asked for, but there are "):
        Sampling(mode="fixed", size=3).draw(range(2), seed=0, round_index=0)


def test_seeds_have_names() -> None:
    assert seed_for(0, "noise", 1) != seed_for(0, "noise", 11)
    assert seed_for(0, "a", "b") != seed_for(0, "ab")
    assert 0 <= seed_for(3, "x") < 2**63
    assert generator_for(0, "x").initial_seed() == seed_for(0, "x")
