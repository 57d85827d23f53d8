"""Which rows are a head: every layout by hand, and ranking against the loops of the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_plugins.tee_split.heads import head_rows, select_rows
from tests.hf_plugins.tee_split.reference import rank_heads

GQA = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 2}


def test_layouts_by_hand() -> None:
    """4 query heads, 2 key-value heads, 2 rows each."""
    assert head_rows("q", **GQA)["q"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert head_rows("k", **GQA)["k"].tolist() == [[0, 1], [2, 3]]
    together = head_rows("concatenated", **GQA)
    assert together["k"].tolist() == [[8, 9], [10, 11]]
    assert together["v"].tolist() == [[12, 13], [14, 15]]
    mixed = head_rows("interleaved", **GQA)
    # Group 0: q0 q1 k0 v0, group 1: q2 q3 k1 v1.
    assert mixed["q"].tolist() == [[0, 1], [2, 3], [8, 9], [10, 11]]
    assert mixed["k"].tolist() == [[4, 5], [12, 13]]
    assert mixed["v"].tolist() == [[6, 7], [14, 15]]


@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_fused_layouts_share_out_every_row_once(layout: str, kv: int, share: int, dim: int) -> None:
    parts = head_rows(layout, num_heads=kv * share, num_kv_heads=kv, head_dim=dim)
    rows = torch.cat([part.flatten() for part in parts.values()])
    assert sorted(rows.tolist()) == list(range((kv * share + 2 * kv) * dim))


@given(
    st.integers(1, 9),
    st.integers(1, 4),
    st.floats(0, 1),
    st.sampled_from(["top", "bottom"]),
    st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_selection_is_the_brute_force_ranking(
    heads: int, dim: int, ratio: float, select: str, seed: int
) -> None:
    weight = torch.randn(heads * dim, 3, generator=torch.Generator().manual_seed(seed))
    blocks = torch.arange(heads * dim).view(heads, dim)
    found = select_rows(weight, blocks, ratio=ratio, select=select)
    assert found.tolist() == rank_heads(weight, blocks.tolist(), int(ratio * heads), largest=select == "top")
    assert found.numel() == int(ratio * heads) * dim


def test_ties_go_to_the_first_head() -> None:
    blocks = torch.arange(4).view(4, 1)
    assert select_rows(torch.ones(4, 2), blocks, ratio=0.5).tolist() == [0, 1]


def test_random_follows_its_generator() -> None:
    blocks, weight = torch.arange(64).view(64, 1), torch.ones(64, 1)
    first, again, other = (
        select_rows(
            weight, blocks, ratio=0.5, select="random", generator=torch.Generator().manual_seed(seed)
        ).tolist()
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    assert first == sorted(set(first))


def test_wrong_values() -> None:
    with pytest.raises(ValueError, match="must be a multiple of num_kv_heads=3"):
        head_rows("q", num_heads=4, num_kv_heads=3, head_dim=2)
    with pytest.raises(ValueError, match="layout must be"):
        head_rows("diagonal", **GQA)
    with pytest.raises(ValueError, match="write 0.05 for 5 %"):
        select_rows(torch.ones(2, 2), torch.arange(2).view(2, 1), ratio=5.0)
    with pytest.raises(ValueError, match="select must be 'top', 'bottom' or 'random'"):
        select_rows(torch.ones(2, 2), torch.arange(2).view(2, 1), ratio=0.5, select="best")
