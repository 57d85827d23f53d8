"""The k largest scores, exactly: against a full sort, on ties, on every path."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_plugins.fapm import selection
from hf_plugins.fapm.score import Rule, Scorer, mean_magnitude
from hf_plugins.fapm.selection import (
    Selection,
    Threshold,
    float_keys,
    key_float,
    locate,
    masks,
    radix_thresholds,
    select,
)
from tests.hf_plugins.fapm import reference
from tests.hf_plugins.fapm.tiny import moved, pair


def scorer_of(values: Tensor, *, chunk: int = 1 << 18) -> Scorer:
    """Scores that are |values|: magnitude from a base of zeros."""
    return Scorer(pair(torch.zeros_like(values), values), Rule("magnitude"), mu=0.0, chunk=chunk)


class Given(Scorer):
    """Scores as given, signs and infinities included."""

    def __init__(self, values: Tensor, *, chunk: int = 4096) -> None:
        super().__init__(pair(torch.ones_like(values), values), Rule(), mu=0.0, chunk=chunk)
        self.values = values

    def score(self, w_N: Tensor, ft_N: Tensor, start: int) -> tuple[Tensor, Tensor]:
        # Samples come without their place, so the value itself travels as the fine-tuned entry.
        return ft_N.clone(), torch.zeros_like(ft_N)


def mask_of(scorer: Scorer, found: Selection) -> np.ndarray:
    return np.concatenate([mask for _, mask in masks(scorer, found)])


def expected_mask(values: Tensor, k: int) -> np.ndarray:
    """A stable full sort: equal values keep their order, so the lowest index is first."""
    order = torch.sort(values, descending=True, stable=True).indices[:k]
    mask = np.zeros(len(values), dtype=bool)
    mask[order.numpy()] = True
    return mask


floats = st.floats(width=32, allow_nan=False, allow_infinity=True)


@given(values=st.lists(floats, min_size=1, max_size=60), data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_small_selection_is_a_stable_sort(values: list[float], data: st.DataObject) -> None:
    tensor = torch.tensor(values)
    k = data.draw(st.integers(0, len(values)))
    scorer = Given(tensor, chunk=data.draw(st.integers(1, 70)))
    assert np.array_equal(mask_of(scorer, select(scorer, k)), expected_mask(tensor, k))


CASES = {
    "random": lambda n, g: torch.randn(n, generator=g),
    "constant": lambda n, g: torch.full((n,), 0.25),
    "two values": lambda n, g: (torch.rand(n, generator=g) < 0.9).float(),
    "denormal": lambda n, g: torch.randn(n, generator=g) * 1e-42,
    "all negative": lambda n, g: -torch.rand(n, generator=g) - 1,
    "a third zero": lambda n, g: torch.randn(n, generator=g) * (torch.rand(n, generator=g) > 0.3),
    "few values": lambda n, g: torch.randint(0, 5, (n,), generator=g).float(),
    "infinite": lambda n, g: torch.where(
        torch.rand(n, generator=g) < 0.5, -torch.inf, torch.randn(n, generator=g)
    ),
    "sorted": lambda n, g: torch.arange(n).float(),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("keep", [1e-5, 0.1, 0.3, 0.55, 0.9, 0.99999])
def test_large_selection_is_a_stable_sort(case: str, keep: float) -> None:
    """100,003 entries take the bracket, the counted or the radix path; the threshold is that of topk."""
    values = CASES[case](100_003, torch.Generator().manual_seed(1))
    scorer, k = Given(values), int(100_003 * keep)
    found = select(scorer, k)
    assert found.path in ("bracket", "counted", "radix")
    assert found.threshold.value == float(torch.topk(values, k).values.min())
    assert np.array_equal(mask_of(scorer, found), expected_mask(values, k))


def test_each_path_is_taken() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(100_003, generator=generator)
    assert select(Given(values), 10_000).path == "bracket"
    assert select(Given(torch.full((100_003,), 0.5)), 10_000).path == "counted"
    # The k-th largest is -inf, which no bracket ends at.
    assert select(Given(torch.where(values < 0, -torch.inf, values)), 90_000).path == "radix"
    assert select(Given(values[:1000]), 10).path == "sorted"
    assert (select(Given(values), 0).path, select(Given(values), 100_003).path) == ("none", "all")


def test_missed_bracket_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bracket on the wrong side, or one that holds too many, still ends in the exact answer."""
    values = torch.randn(100_003, generator=torch.Generator().manual_seed(2))
    for bracket in ((2.0, 3.0, 10), (-3.0, -2.0, 10), (-50.0, 50.0, 1)):
        monkeypatch.setattr(selection, "sampled_bracket", lambda *a, bracket=bracket, **k: bracket)
        monkeypatch.setattr(selection, "DIRECT", 1000)
        found = select(Given(values), 10_000)
        assert found.path == "radix"
        assert np.array_equal(mask_of(Given(values), found), expected_mask(values, 10_000))


def test_huge_tensor_computes_its_mask_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "STORED", 50_000)
    values = torch.randn(100_003, generator=torch.Generator().manual_seed(3))
    found = select(Given(values), 10_000)
    assert (found.path, found.bits) == ("bracket", [])
    assert np.array_equal(mask_of(Given(values), found), expected_mask(values, 10_000))


def test_ties_take_the_lowest_indices() -> None:
    """Magnitudes 1 everywhere: ten of a hundred thousand are the first ten, whatever the chunk."""
    for chunk in (501, 4096, 200_000):
        mask = mask_of(scorer := scorer_of(torch.ones(70_001), chunk=chunk), select(scorer, 10))
        assert np.flatnonzero(mask).tolist() == list(range(10))


def test_many_ranks_in_one_count() -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(4))
    ks = [1, 17, 2500, 5000]
    found = radix_thresholds(Given(values).scores, ks)
    ordered = torch.sort(values, descending=True).values
    assert [threshold.value for threshold in found] == [float(ordered[k - 1]) for k in ks]
    assert all(threshold.ties == 1 for threshold in found)


@given(st.lists(floats.map(lambda x: x + 0.0), min_size=2, max_size=50))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_keys_sort_as_floats_and_come_back(values: list[float]) -> None:
    array = np.array(values, dtype=np.float32)
    keys = float_keys(array)
    assert np.array_equal(np.argsort(keys, kind="stable"), np.argsort(array, kind="stable"))
    assert all(key_float(int(key)) == x for key, x in zip(keys, array, strict=True))


def test_locate_by_hand() -> None:
    """Counts 3, 0, 2, 1 from the lowest bin: rank 1 is in bin 3, the next two in bin 2, the rest in bin 0."""
    counts = np.array([3, 0, 2, 1])
    assert [locate(counts, k) for k in range(1, 7)] == [(3, 1), (2, 1), (2, 2), (0, 1), (0, 2), (0, 3)]


def test_survey_of_a_selection() -> None:
    """Energy is the sum of squares, positives are S > 0, undefined are the 0/0, on every path."""
    w, ft = moved(70_000)
    w[:100] = ft[:100] = 0.0
    each = pair(w, ft)
    scorer = Scorer(each, Rule(), mu=mean_magnitude(each)[0], chunk=4096)
    score = torch.tensor(reference.scores(w.tolist(), ft.tolist()))
    for k in (0, 1, 7000, 69_999, 70_000):
        found = select(scorer, k)
        assert found.energy == pytest.approx(float((ft - w).double().square().sum()), rel=1e-5)
        assert found.num_positive == int((score > 0).sum())
        assert found.num_undefined == 100


def test_threshold_in_another_tensor_takes_what_it_says() -> None:
    values = torch.tensor([3.0, 1.0, 1.0, 2.0, 1.0])
    found = Selection(Threshold(1.0, 2), "global")
    assert mask_of(Given(values, chunk=2), found).tolist() == [True, True, True, True, False]
