"""The search of vocabulary matching, on a small function whose states are known."""

import pytest
import torch

from hf_plugins.embed_parrot.defences import sorted_entries
from hf_plugins.embed_parrot.vocabulary import match_vocabulary


class ToyPrefix:
    """States that depend on the token and on all before it: ``h[t] = E[x_t] + 0.5 * h[t-1] / (1 +
    |h[t-1]|)``.
    """

    def __init__(self, table: torch.Tensor, num_texts: int) -> None:
        self.table = table
        self.state = torch.zeros(num_texts, table.shape[1])

    def probe(self, rows: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        before = self.state[rows]
        return self.table[candidates] + (0.5 * before / (1 + before.norm(dim=1, keepdim=True)))[:, None]

    def accept(self, tokens: torch.Tensor) -> None:
        rows = torch.arange(len(tokens))
        self.state = self.probe(rows, tokens[:, None])[:, 0]


@pytest.fixture
def table() -> torch.Tensor:
    return torch.randn(60, 8, generator=torch.Generator().manual_seed(0))


def _observed(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    prefix, states = ToyPrefix(table, len(ids)), []
    for t in range(ids.shape[1]):
        prefix.accept(ids[:, t])
        states.append(prefix.state)
    return torch.stack(states, 1)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 60, (3, 7), generator=torch.Generator().manual_seed(1))


LENGTHS = torch.tensor([7, 4, 6])


def test_all_tokens_are_found(table: torch.Tensor, ids: torch.Tensor) -> None:
    found = match_vocabulary(ToyPrefix(table, 3), _observed(table, ids), LENGTHS, vocab_size=60, block=16)
    for row, length in enumerate(LENGTHS.tolist()):
        assert found.ids_NT[row, :length].tolist() == ids[row, :length].tolist()
        assert (found.ids_NT[row, length:] == -1).all()
    inside = found.ids_NT >= 0
    assert (found.ratio_NT[inside] < 1e-3).all()
    assert (found.best_NT[inside] < 1e-5).all()
    assert found.num_probes == 60 * 17
    assert found.num_widened == 0


def test_shortlist_saves_work_and_loses_nothing(table: torch.Tensor, ids: torch.Tensor) -> None:
    """Ten candidates with the right one among them, except at two positions, which are tried in full."""
    generator = torch.Generator().manual_seed(2)
    shortlist = torch.randint(0, 60, (3, 7, 10), generator=generator)
    shortlist[..., 4] = ids
    for row, t in ((0, 3), (2, 0)):
        shortlist[row, t] = (ids[row, t] + 1 + torch.arange(10)) % 60
    found = match_vocabulary(
        ToyPrefix(table, 3), _observed(table, ids), LENGTHS, vocab_size=60, ranked_NTK=shortlist
    )
    assert found.num_widened == 2
    assert found.num_probes == 17 * 10 + 2 * 60
    for row, length in enumerate(LENGTHS.tolist()):
        assert found.ids_NT[row, :length].tolist() == ids[row, :length].tolist()


def test_known_noise_settles_a_shortlist(table: torch.Tensor, ids: torch.Tensor) -> None:
    """With noise no winner is twenty times better than the next; within the noise's length it stands."""
    observed = _observed(table, ids)
    noise = 0.3 * torch.randn(observed.shape, generator=torch.Generator().manual_seed(3))
    shortlist = torch.stack([ids, (ids + 1) % 60, (ids + 2) % 60], -1)
    options = {"vocab_size": 60, "ranked_NTK": shortlist}
    strict = match_vocabulary(ToyPrefix(table, 3), observed + noise, LENGTHS, **options)
    loose = match_vocabulary(ToyPrefix(table, 3), observed + noise, LENGTHS, settle_distance=2.0, **options)
    assert strict.num_widened > 0
    assert loose.num_widened == 0
    inside = loose.ids_NT >= 0
    assert (loose.ids_NT[inside] == ids[inside]).all()


def test_long_rankings_are_tried_in_growing_parts(table: torch.Tensor, ids: torch.Tensor) -> None:
    """With the right token at place 11 of 40, parts of 4 and 12 settle: 16 candidates a position, not 40."""
    ranked = (ids[..., None] + 1 + torch.arange(40)) % 60
    ranked[..., 11] = ids
    found = match_vocabulary(
        ToyPrefix(table, 3), _observed(table, ids), LENGTHS, vocab_size=60, ranked_NTK=ranked, first=4
    )
    assert found.num_probes == 16 * 17
    assert found.num_widened == 0
    inside = found.ids_NT >= 0
    assert (found.ids_NT[inside] == ids[inside]).all()
    assert (found.ratio_NT[inside] < 1e-3).all()


def test_a_token_named_twice_is_not_its_own_rival(table: torch.Tensor, ids: torch.Tensor) -> None:
    shortlist = torch.stack([ids, ids, (ids + 1) % 60], -1)
    # A little off, as after a change of dtype: at distance 0 a rival at 0 would not be noticed.
    observed = _observed(table, ids) + 1e-4
    found = match_vocabulary(ToyPrefix(table, 3), observed, LENGTHS, vocab_size=60, ranked_NTK=shortlist)
    assert found.num_widened == 0
    assert (found.ratio_NT[found.ids_NT >= 0] < 1e-3).all()


def test_a_best_that_falls_becomes_the_rival(table: torch.Tensor) -> None:
    """Two rows at distances 1.0 and 0.9, found one after the other: the ratio is 0.9, a guess and no find."""
    goal = table[0].clone()
    near = torch.zeros(8).index_fill(0, torch.tensor([0]), 1.0)
    table[1], table[2] = goal + 1.0 * near, goal - 0.9 * near
    table[0] = 50.0
    ranked = torch.tensor([[[1, 5, 2, 6]]])
    found = match_vocabulary(
        ToyPrefix(table, 1), goal[None, None], torch.tensor([1]), vocab_size=60, ranked_NTK=ranked, first=2
    )
    assert found.ids_NT.tolist() == [[2]]
    assert float(found.ratio_NT) == pytest.approx(0.9, rel=1e-4)
    assert found.num_widened == 1


def test_an_early_rival_is_not_forgotten(table: torch.Tensor) -> None:
    """Two rows at distances 1.0 and 1.1 come first, far ones after them: the ratio stays 1/1.1."""
    goal = table[0].clone()
    near = torch.zeros(8).index_fill(0, torch.tensor([0]), 1.0)
    table[1], table[2] = goal + 1.0 * near, goal - 1.1 * near
    table[0] = 50.0
    ranked = torch.tensor([[[1, 2, 0, 0]]])
    options = {"vocab_size": 60, "ranked_NTK": ranked, "first": 2, "settle_ratio": 0.5}
    found = match_vocabulary(ToyPrefix(table, 1), goal[None, None], torch.tensor([1]), **options)
    assert float(found.ratio_NT) == pytest.approx(1 / 1.1, rel=1e-4)
    assert found.num_widened == 1


def test_wrong_prefix_shows_as_a_jump(table: torch.Tensor) -> None:
    """Made to take a wrong token at t = 2, the best distance jumps there and stays large at t = 3."""
    ids = torch.randint(0, 60, (1, 6), generator=torch.Generator().manual_seed(5))
    observed = _observed(table, ids)
    observed[0, 2] += 2.0
    found = match_vocabulary(ToyPrefix(table, 1), observed, torch.tensor([6]), vocab_size=60)
    assert found.best_NT[0, 2] > 1000 * found.best_NT[0, :2].max()
    if found.ids_NT[0, 2] != ids[0, 2]:
        assert found.best_NT[0, 3] > 1000 * found.best_NT[0, :2].max()


def test_canonical_form_on_both_sides(table: torch.Tensor, ids: torch.Tensor) -> None:
    observed = _observed(table, ids)
    order = torch.rand(observed.shape, generator=torch.Generator().manual_seed(0)).argsort(-1)
    hidden = observed.gather(-1, order)
    found = match_vocabulary(ToyPrefix(table, 3), hidden, LENGTHS, vocab_size=60, canonical=sorted_entries)
    inside = found.ids_NT >= 0
    assert (found.ids_NT[inside] == ids[inside]).all()


@pytest.mark.parametrize("lengths", [[], [0], [8]])
def test_lengths_in_range(table: torch.Tensor, lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"at least one text with 1 \.\. 7 tokens each"):
        match_vocabulary(
            ToyPrefix(table, 1), torch.zeros(len(lengths), 7, 8), torch.tensor(lengths), vocab_size=60
        )


def test_values_must_be_finite_where_they_count(table: torch.Tensor, ids: torch.Tensor) -> None:
    observed = _observed(table, ids)
    observed[1, 5:] = torch.nan
    match_vocabulary(ToyPrefix(table, 3), observed, LENGTHS, vocab_size=60)
    observed[1, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity; nothing can be matched"):
        match_vocabulary(ToyPrefix(table, 3), observed, LENGTHS, vocab_size=60)
