"""Poisson sampling: the law of the batch sizes, independence of units, users bounded."""

import math

import pytest
import torch

from hf_plugins.dp.sampling import bounded_records, poisson_draw, share_of, users_of
from tests.hf_plugins.dp import reference


@pytest.mark.parametrize("secure", [False, True])
def test_batch_sizes_are_binomial(secure: bool) -> None:
    """N = 500, q = 0.1 over 400 draws: mean qN = 50, variance Nq(1-q) = 45; bounds 6 standard errors out."""
    generator = None if secure else torch.Generator().manual_seed(0)
    sizes = torch.tensor([float(len(poisson_draw(500, 0.1, generator))) for _ in range(400)])
    assert abs(sizes.mean() - 50) < 6 * math.sqrt(45 / 400)
    assert abs(sizes.var() / 45 - 1) < 6 * math.sqrt(2 / 399)


def test_every_unit_has_the_same_chance() -> None:
    """2000 draws of 20 units at q = 0.3: 600 each, 6 standard errors = 123."""
    generator = torch.Generator().manual_seed(1)
    counts = torch.zeros(20)
    for _ in range(2000):
        counts[poisson_draw(20, 0.3, generator)] += 1
    assert (counts - 600).abs().max() < 6 * math.sqrt(2000 * 0.3 * 0.7)


def test_rate_one_is_everybody_and_small_rates_can_be_empty() -> None:
    assert poisson_draw(5, 1.0, None) == [0, 1, 2, 3, 4]
    generator = torch.Generator().manual_seed(0)
    assert any(poisson_draw(3, 0.05, generator) == [] for _ in range(50))


@pytest.mark.parametrize("secure", [False, True])
def test_user_gives_a_bounded_number_of_records(secure: bool) -> None:
    generator = None if secure else torch.Generator().manual_seed(0)
    records = list(range(100, 120))
    seen = set()
    for _ in range(60):
        chosen = bounded_records(records, 3, generator)
        assert len(chosen) == 3
        assert len(set(chosen)) == 3
        assert set(chosen) <= set(records)
        assert chosen == sorted(chosen)
        seen |= set(chosen)
    # 60 draws of 3 out of 20: a record is missed with probability 0.85**60 = 6e-5; all but one must be seen.
    assert len(seen) >= 19
    assert bounded_records([4, 7], 3, generator) == [4, 7]


def test_records_of_users() -> None:
    column = ["ann", "bob", "ann", "cid", "bob", "ann"]
    assert users_of(column) == list(reference.users(column).values()) == [[0, 2, 5], [1, 4], [3]]
    with pytest.raises(ValueError, match="Give each such record a user of its own"):
        users_of(["ann", None])


def test_ranks_share_the_units_without_overlap() -> None:
    drawn = [0, 1, 4, 5, 7, 9]
    parts = [share_of(drawn, rank, 3) for rank in range(3)]
    assert sorted(unit for part in parts for unit in part) == drawn
    assert parts[1] == [1, 4, 7]
