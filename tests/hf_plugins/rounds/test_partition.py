"""Splits: nobody loses a record, skew follows alpha."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_plugins.rounds import dirichlet_split, split_by


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    share=st.floats(0.05, 1.0),
    alpha=st.sampled_from([1e-3, 0.3, 100.0]),
)
def test_every_record_has_one_owner(labels: list[int], share: float, alpha: float) -> None:
    num_clients = max(1, int(share * len(labels)))
    parts = dirichlet_split(labels, num_clients, alpha=alpha, seed=0)
    assert len(parts) == num_clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_small_alpha_gives_few_classes() -> None:
    labels = [i % 10 for i in range(5000)]
    classes = {}
    for alpha in (0.1, 100.0):
        parts = dirichlet_split(labels, 50, alpha=alpha, seed=1)
        classes[alpha] = np.mean([len({labels[i] for i in part}) for part in parts])
    assert classes[0.1] < 6
    assert classes[100.0] > 9.5
    again = dirichlet_split(labels, 50, alpha=0.1, seed=1)
    assert all(
        np.array_equal(a, b)
        for a, b in zip(again, dirichlet_split(labels, 50, alpha=0.1, seed=1), strict=True)
    )


def test_by_name() -> None:
    assert [part.tolist() for part in split_by(["b", "a", "b"])] == [[0, 2], [1]]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="0.3 is skewed, 100 nearly uniform"):
        dirichlet_split([0, 1], 1, alpha=0, seed=0)
    with pytest.raises(ValueError, match="clients need at least as many records"):
        dirichlet_split([0, 1], 3, alpha=1, seed=0)
