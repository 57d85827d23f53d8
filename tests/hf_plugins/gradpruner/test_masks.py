"""Exact selection of the k largest entries from row blocks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_plugins.gradpruner.masks import Cut, TopMask, largest_entries
from tests.hf_plugins.gradpruner import reference


def select(matrix: torch.Tensor, k: int, rows: int) -> torch.Tensor:
    blocks = list(matrix.split(rows))
    mask = TopMask(largest_entries(lambda: iter(blocks), k))
    return torch.cat([mask(block) for block in blocks])


VALUES = st.sampled_from([0.0, 1e-45, 1e-30, 1.0, 1.0 + 2**-23, 1.5, 3e38, float("inf")])


@given(st.lists(st.lists(VALUES, min_size=3, max_size=3), min_size=1, max_size=7), st.data())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_against_a_full_sort(rows: list[list[float]], data: st.DataObject) -> None:
    """Ties, subnormal numbers, neighbours of one bit, infinity; whatever the block size."""
    matrix = torch.tensor(rows, dtype=torch.float32)
    k = data.draw(st.integers(0, matrix.numel()))
    size = data.draw(st.integers(1, len(rows)))
    mask = select(matrix, k, size)
    assert torch.equal(mask, reference.donor_mask(matrix, (k + 0.5) / matrix.numel()))
    assert int(mask.sum()) == k


def test_cut_by_hand() -> None:
    """Entries 4 3 3 1, two kept: the cut is at 3.0 (bits 0x40400000) and one of the two threes is kept."""
    blocks = torch.tensor([[4.0, 3.0], [3.0, 1.0]])
    assert largest_entries(lambda: iter([blocks]), 2) == Cut(0x40400000, 1)
    assert select(blocks, 2, 1).tolist() == [[True, True], [False, False]]


def test_large_random_matrix() -> None:
    matrix = torch.rand(300, 211, generator=torch.Generator().manual_seed(0))
    mask = select(matrix, 12_660, 17)
    assert int(mask.sum()) == 12_660
    assert matrix[mask].min() > matrix[~mask].max()


@pytest.mark.parametrize("k", [-1, 7])
def test_impossible_counts(k: int) -> None:
    with pytest.raises(ValueError, match="keep must lie in"):
        largest_entries(lambda: iter([torch.zeros(2, 3)]), k)
