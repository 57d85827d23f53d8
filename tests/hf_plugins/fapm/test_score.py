"""Scores of one chunk: by hand, at zeros, for every method."""

import math

import numpy as np
import pytest
import torch

from hf_plugins.fapm.score import METHODS, Rule, Scorer, chunks, mean_magnitude, random_score
from tests.hf_plugins.fapm.tiny import moved, pair


def scored(w: list[float], ft: list[float], **rule: object) -> list[float]:
    each = pair(torch.tensor(w), torch.tensor(ft))
    mu, _ = mean_magnitude(each)
    return [float(x) for _, s in Scorer(each, Rule(**rule), mu=mu).scores() for x in s]


def test_four_entries_by_hand() -> None:
    """mu = (1 + 2 + 4 + .5) / 4 = 1.875 and |dW| = .5, .5, .25, 1: S_0 = .5 - 1.875 * .5 / 1 = -.4375,
    S_1 = .5 - 1.875 * .25 = .03125, S_2 = .25 - 1.875 * .0625 = .1328125, S_3 = 1 - 1.875 * 2 = -2.75.
    """
    found = scored([1.0, -2.0, 4.0, 0.5], [1.5, -2.5, 4.25, 1.5])
    assert found == [-0.4375, 0.03125, 0.1328125, -2.75]


def test_coefficient_scales_the_relative_term() -> None:
    """Half of the factor: S_1 = .5 - .5 * 1.875 * .25 = .265625; factor 0 leaves |dW|."""
    w, ft = [1.0, -2.0, 4.0, 0.5], [1.5, -2.5, 4.25, 1.5]
    assert scored(w, ft, coefficient=0.5)[1] == 0.265625
    assert scored(w, ft, coefficient=0.0) == [0.5, 0.5, 0.25, 1.0]


def test_other_methods_by_hand() -> None:
    w, ft = [1.0, -2.0, 4.0, 0.5], [1.5, -2.5, 4.25, 1.5]
    assert scored(w, ft, method="magnitude") == scored(w, ft, method="ties") == [0.5, 0.5, 0.25, 1.0]
    assert scored(w, ft, method="relative") == [-0.5, -0.25, -0.0625, -2.0]


def test_zero_weights_rank_last() -> None:
    assert scored([0.0, 0.0, 1.0], [0.5, 0.0, 1.0]) == [-np.inf, -np.inf, 0.0]


def test_all_zero_base_falls_back_to_magnitude() -> None:
    assert scored([0.0, 0.0], [0.5, -2.0]) == [0.5, 2.0]


def test_mean_is_summed_in_double_precision() -> None:
    """Rounded once, from an exact sum: sums in fp32 miss the last bit in some of twenty tensors."""
    for seed in range(20):
        w, _ = moved(20_001, seed=seed)
        expected = float(np.float32(math.fsum(abs(x) for x in w.tolist()) / 20_001))
        assert mean_magnitude(pair(w, w), chunk=6_000) == (expected, 0)
    assert mean_magnitude(pair(torch.tensor([0.0, -3.0]), torch.zeros(2))) == (1.5, 1)
    assert mean_magnitude(pair(torch.empty(0), torch.empty(0))) == (0.0, 0)


def test_chunks_do_not_change_scores() -> None:
    w, ft = moved(1000)
    for method in METHODS:
        whole, parts = (
            torch.cat(
                [s.clone() for _, s in Scorer(pair(w, ft), Rule(method), mu=0.016, chunk=size).scores()]
            )
            for size in (1000, 7)
        )
        assert torch.equal(whole, parts)


def test_random_score_depends_on_index_and_seed_alone() -> None:
    whole = random_score(0, 4096, seed=3)
    assert torch.equal(whole[100:200], random_score(100, 200, seed=3))
    assert not torch.equal(whole, random_score(0, 4096, seed=4))
    assert whole.min() >= 0
    assert whole.max() < 1
    # Mean 1/2 and variance 1/12 of a uniform variable, 6 sigma of 4,096 draws.
    assert abs(float(whole.mean()) - 0.5) < 6 * (1 / 12 / 4096) ** 0.5
    # Of consecutive values every lag is free of correlation: 6 sigma of 4,095 products.
    centred = whole - 0.5
    assert abs(float((centred[1:] * centred[:-1]).mean())) < 6 / 12 / 4095**0.5


def test_scale_of_the_kept_part() -> None:
    assert Rule("dare").scale(0.25) == 4.0
    assert Rule("dare").scale(0.0) == 1.0
    assert Rule("wise_ft").scale(0.3) == 0.3
    assert Rule("fapm").scale(0.3) == 1.0
    assert not Rule("wise_ft").masks


@pytest.mark.parametrize(("numel", "size"), [(0, 3), (1, 3), (3, 3), (7, 3)])
def test_chunks_cover_once(numel: int, size: int) -> None:
    assert [index for start, stop in chunks(numel, size) for index in range(start, stop)] == list(
        range(numel)
    )
