"""Nearest rows: exactness, ties, blocks, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_plugins.embed_parrot import matching
from hf_plugins.embed_parrot.matching import best_rows, lowest_twins, unit_rows
from tests.hf_plugins.embed_parrot import reference


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(2, 6), st.integers(0, 99))
def test_agrees_with_loops(num_tokens: int, rows: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(rows, width, generator=generator)
    query = torch.randn(num_tokens, width, generator=generator)
    found = best_rows(unit_rows(query), unit_rows(table), lowest_twins(table))
    assert found.ids_TK[:, 0].tolist() == reference.hei(query, table)


def test_scores_are_cosines_and_fall() -> None:
    """Against the axes of the plane, (3, 4) has cosines 3/5 and 4/5."""
    table = torch.eye(2)
    found = best_rows(unit_rows(torch.tensor([[3.0, 4.0]])), table, lowest_twins(table), top=2)
    assert found.ids_TK.tolist() == [[1, 0]]
    torch.testing.assert_close(found.scores_TK, torch.tensor([[0.8, 0.6]]))


def test_twins_name_the_lowest_row() -> None:
    table = torch.tensor([[1.0, 2.0], [3.0, 0.0], [1.0, 2.0], [3.0, -0.0], [1.0, 2.0]])
    assert lowest_twins(table).tolist() == [0, 1, 0, 1, 0]


def test_blocks_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query, table = unit_rows(torch.randn(50, 8)), unit_rows(torch.randn(30, 8))
    whole = best_rows(query, table, lowest_twins(table), top=3)
    monkeypatch.setattr(matching, "_BLOCK_SCORES", 7 * 30)
    blocks = best_rows(query, table, lowest_twins(table), top=3)
    assert torch.equal(whole.ids_TK, blocks.ids_TK)
    torch.testing.assert_close(whole.scores_TK, blocks.scores_TK)


def test_no_vector_gives_no_answer() -> None:
    assert best_rows(torch.empty(0, 4), torch.randn(5, 4), torch.arange(5), top=2).ids_TK.shape == (0, 2)


def test_zero_row_stays_zero() -> None:
    assert torch.equal(unit_rows(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_widths_must_agree() -> None:
    with pytest.raises(ValueError, match="hidden states have width .*3.*, the table has .*4"):
        best_rows(torch.randn(2, 3), torch.randn(5, 4), torch.arange(5))


@pytest.mark.parametrize("top", [0, 6])
def test_top_in_range(top: int) -> None:
    with pytest.raises(ValueError, match=r"top must lie in 1 \.\. .*5"):
        best_rows(torch.randn(2, 4), torch.randn(5, 4), torch.arange(5), top=top)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_must_be_finite(value: float) -> None:
    query = torch.randn(3, 4)
    query[1, 2] = value
    with pytest.raises(ValueError, match="1 of 3.* hidden states hold NaN or infinity; look for overflow"):
        best_rows(query, torch.randn(5, 4), torch.arange(5))
