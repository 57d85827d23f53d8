"""BEI, HEI and ridge as functions of plain tensors."""

import pytest
import torch

from hf_plugins.embed_parrot.defences import sorted_entries
from hf_plugins.embed_parrot.inversion import BaseEmbedInversion, HotmapEmbedInversion, RidgeInversion
from tests.hf_plugins.embed_parrot import reference


@pytest.fixture
def table() -> torch.Tensor:
    return torch.randn(40, 12, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(25, 12, generator=torch.Generator().manual_seed(4))


def test_hei_agrees_with_loops(table: torch.Tensor, hidden: torch.Tensor) -> None:
    assert HotmapEmbedInversion(table)(hidden).tolist() == reference.hei(hidden, table)


def test_hei_of_embeddings_is_the_text(table: torch.Tensor) -> None:
    ids = torch.randint(0, 40, (100,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(HotmapEmbedInversion(table)(table[ids]), ids)


def test_hei_gives_a_planted_duplicate_its_lower_id(table: torch.Tensor) -> None:
    table[31] = table[7]
    attack = HotmapEmbedInversion(table)
    assert attack(table).tolist() == [7 if i == 31 else i for i in range(40)]
    assert attack.num_duplicates == 1
    # Ranked further down a copy still goes by its lower id, however rounding orders the two.
    assert attack.top(table[[31]], 2).ids_TK.tolist() == [[7, 7]]


def test_hei_does_not_see_lengths(table: torch.Tensor, hidden: torch.Tensor) -> None:
    """Powers of two scale exactly, so even ties cannot move."""
    scales = 2.0 ** torch.randint(-3, 4, (40, 1), generator=torch.Generator().manual_seed(1))
    plain = HotmapEmbedInversion(table)(hidden)
    assert torch.equal(HotmapEmbedInversion(table)(hidden * scales[:25]), plain)
    assert torch.equal(HotmapEmbedInversion(table * scales)(hidden), plain)


def test_bei_sees_lengths_of_head_rows(table: torch.Tensor, hidden: torch.Tensor) -> None:
    """Blown up a thousandfold, row 5 wins wherever its logit is positive."""
    louder = table.clone()
    louder[5] *= 1000
    positive = hidden @ table[5] > 0.01
    found = BaseEmbedInversion(louder)(hidden)
    assert (found[positive] == 5).all()
    assert not torch.equal(found, BaseEmbedInversion(table)(hidden))


def test_bei_with_and_without_softmax(table: torch.Tensor, hidden: torch.Tensor) -> None:
    bias = torch.linspace(-2, 2, 40)
    assert BaseEmbedInversion(table)(hidden).tolist() == reference.bei(hidden, table)
    assert BaseEmbedInversion(table, bias_V=bias)(hidden).tolist() == reference.bei(hidden, table, bias)


def test_bei_applies_the_norm_first(table: torch.Tensor, hidden: torch.Tensor) -> None:
    def norm(x: torch.Tensor) -> torch.Tensor:
        return x - 3 * x.mean(1, keepdim=True)

    found = BaseEmbedInversion(table, norm=norm)(hidden)
    assert torch.equal(found, BaseEmbedInversion(table)(norm(hidden)))
    assert not torch.equal(found, BaseEmbedInversion(table)(hidden))


def test_canonical_form_is_applied_to_both_sides(table: torch.Tensor) -> None:
    shuffled = table[:, torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    attack = HotmapEmbedInversion(table, canonical=sorted_entries)
    assert attack(shuffled).tolist() == list(range(40))
    assert HotmapEmbedInversion(table)(shuffled).tolist() != list(range(40))


def _mixed(table: torch.Tensor, num_tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """States that are an affine map of embeddings plus a little noise."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(12, 12, generator=torch.Generator().manual_seed(9))
    ids = torch.randint(0, 40, (num_tokens,), generator=generator)
    return table[ids] @ mix + 5 + 0.01 * torch.randn(num_tokens, 12, generator=generator), ids


@pytest.mark.parametrize("penalty", [1e-6, 0.1])
def test_ridge_agrees_with_the_inverse(table: torch.Tensor, penalty: float) -> None:
    states, ids = _mixed(table, 200, 0)
    attack = RidgeInversion(table).update(states, ids)
    assert attack.solve(penalties=(penalty,)) == penalty
    # The core hands the map on in fp32; its entries are of order 1.
    expected = reference.ridge(states, table[ids], penalty)
    torch.testing.assert_close(attack.weight_DE.double(), expected, atol=1e-5, rtol=1e-4)


def test_ridge_undoes_a_linear_map_that_hides_from_hei(table: torch.Tensor) -> None:
    states, ids = _mixed(table, 400, 0)
    fresh, truth = _mixed(table, 100, 1)
    attack = RidgeInversion(table).update(states, ids)
    attack.solve()
    assert (attack(fresh) == truth).all()
    assert (HotmapEmbedInversion(table)(fresh) == truth).float().mean() < 0.3


def test_ridge_in_pieces_equals_ridge_at_once(table: torch.Tensor) -> None:
    states, ids = _mixed(table, 300, 0)
    whole, pieces = RidgeInversion(table).update(states, ids), RidgeInversion(table)
    for start in range(0, 300, 70):
        pieces.update(states[start : start + 70], ids[start : start + 70])
    whole.solve(penalties=(1e-4,))
    pieces.solve(penalties=(1e-4,))
    assert pieces.num_tokens == 300
    torch.testing.assert_close(whole.weight_DE, pieces.weight_DE, atol=1e-5, rtol=1e-5)


def test_held_out_text_chooses_the_penalty(table: torch.Tensor) -> None:
    """A penalty of a million shrinks the map to almost nothing but its bias; held-out text sees that."""
    states, ids = _mixed(table, 300, 0)
    fresh, truth = _mixed(table, 100, 1)
    attack = RidgeInversion(table).update(states, ids)
    assert attack.solve(penalties=(1e6, 1e-4), hidden_TD=fresh, ids_T=truth) == 1e-4
    assert (attack(fresh) == truth).all()


def test_top_holds_the_best_first(table: torch.Tensor, hidden: torch.Tensor) -> None:
    for attack in (BaseEmbedInversion(table), HotmapEmbedInversion(table)):
        found = attack.top(hidden, 5)
        assert found.ids_TK.shape == (25, 5)
        assert torch.equal(found.ids_TK[:, 0], attack(hidden))
        assert (found.scores_TK.diff(dim=1) <= 0).all()


def test_ridge_needs_text_and_solving(table: torch.Tensor, hidden: torch.Tensor) -> None:
    attack = RidgeInversion(table)
    with pytest.raises(RuntimeError, match=r"call update\(hidden, ids\) before solve"):
        attack.solve()
    with pytest.raises(RuntimeError, match=r"call solve\(\) after the last update"):
        attack(hidden)
    with pytest.raises(ValueError, match="as many hidden states as tokens, at least one; got .*25 and 3"):
        attack.update(hidden, torch.tensor([1, 2, 3]))


def test_ridge_refuses_states_of_another_model(table: torch.Tensor, hidden: torch.Tensor) -> None:
    attack = RidgeInversion(table).update(hidden, torch.arange(25))
    attack.solve()
    with pytest.raises(
        ValueError, match="the map was fitted on .*12.*; fit one map for each model and layer"
    ):
        attack(torch.randn(3, 13))
