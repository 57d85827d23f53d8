"""FAPM on one tensor: by hand, against the five lines, its invariants, the bf16 trap, wrong input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_plugins.fapm import fapm_prune_tensor
from hf_plugins.fapm.task_vector import num_kept
from tests.hf_plugins.fapm import reference
from tests.hf_plugins.fapm.tiny import moved

W, FT = [1.0, -2.0, 4.0, 0.5], [1.5, -2.5, 4.25, 1.5]


def mask(w: torch.Tensor, ft: torch.Tensor, keep: float, **options: object) -> torch.Tensor:
    """Where the output took the fine-tuned value."""
    return fapm_prune_tensor(w, ft, keep=keep, **options)[0] != w


def test_four_entries_by_hand() -> None:
    """mu = 1.875, S = [-.4375, .03125, .1328125, -2.75] (see test_score): entries 1 and 2 are the largest."""
    out, stats = fapm_prune_tensor(torch.tensor(W), torch.tensor(FT), keep=0.5)
    assert out.tolist() == [1.0, -2.5, 4.25, 0.5]
    assert (stats.num_kept, stats.mean_magnitude, stats.threshold) == (2, 1.875, 0.03125)
    assert (stats.positive_ratio, stats.moved_ratio, stats.effective_density) == (0.5, 1.0, 0.5)
    # Kept squares .25 + .0625 of .25 + .25 + .0625 + 1.
    assert stats.kept_energy == pytest.approx(0.3125 / 1.5625)


def test_zero_and_one_give_the_inputs() -> None:
    w, ft = moved(1000, dtype=torch.bfloat16)
    assert torch.equal(fapm_prune_tensor(w, ft, keep=0.0)[0], w)
    assert torch.equal(fapm_prune_tensor(w, ft, keep=1.0)[0], ft)


@pytest.mark.parametrize(
    ("numel", "keep", "k"), [(100, 0.29, 28), (9, 0.1, 0), (4096, 0.1, 409), (525_336_576, 0.1, 52_533_657)]
)
def test_count_truncates(numel: int, keep: float, k: int) -> None:
    """int(100 * .29) is 28, since the product is 28.999999999999996."""
    assert num_kept(numel, keep) == k


def test_exactly_k_entries_and_nested_masks() -> None:
    w, ft = moved(4096)
    previous = torch.zeros(4096, dtype=torch.bool)
    for keep in (0.01, 0.1, 0.29, 0.5, 0.9):
        now = mask(w, ft, keep)
        assert int(now.sum()) == int(4096 * keep)
        assert bool((now | ~previous).all())
        previous = now


@pytest.mark.parity
@pytest.mark.parametrize("numel", [1, 37, 4096, 100_003])
@pytest.mark.parametrize("keep", [0.03, 0.1, 0.5])
def test_equal_to_the_five_lines_bit_for_bit(numel: int, keep: float) -> None:
    w, ft = moved(numel, seed=numel)
    # Both sides round the mean in their own way; given one mean, not a bit may differ.
    expected, chosen = reference.five_lines(w, ft, keep)
    out, _ = fapm_prune_tensor(w, ft, keep=keep, mu=float(w.abs().mean()))
    assert torch.equal(out.view(torch.int32), expected.view(torch.int32))
    assert torch.equal(out != w, chosen)


entries = st.floats(min_value=-8, max_value=8, width=16)


@given(st.lists(st.tuples(entries, entries), min_size=1, max_size=40), st.floats(0, 1), st.integers(1, 50))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_equal_to_the_loops(values: list[tuple[float, float]], keep: float, chunk: int) -> None:
    w, ft = [list(side) for side in zip(*values, strict=True)]
    expected = reference.fapm_loops(w, ft, keep)
    out, stats = fapm_prune_tensor(torch.tensor(w), torch.tensor(ft), keep=keep, chunk=chunk)
    assert out.tolist() == expected
    assert stats.num_kept == int(len(w) * keep)


def test_zero_rows_do_not_eat_the_budget() -> None:
    """10 of 64 rows are padding: all 307 places go to real entries; the five lines lose them to 0/0."""
    w, ft = (x.view(64, 48).clone() for x in moved(64 * 48))
    w[:10] = ft[:10] = 0.0
    kept = mask(w, ft, 0.1)
    assert not kept[:10].any()
    assert int(kept.sum()) == 307
    lost = reference.five_lines(w, ft, 0.1)[1]
    assert int(lost[:10].sum()) == 307


def test_moved_zero_weights_come_last() -> None:
    w, ft = moved(1000)
    w[:100], ft[:100] = 0.0, 5.0
    assert not mask(w, ft, 0.9)[:100].any()
    assert mask(w, ft, 0.95)[:50].all()


def test_kept_entries_lie_above_the_mean_while_scores_are_positive() -> None:
    w, ft = moved(100_000)
    kept = mask(w, ft, 0.4)
    mean = float(w.abs().double().mean())
    assert float(w.abs()[kept].min()) > mean
    # Share of a Gaussian above its mean magnitude, erfc(1/sqrt(pi)) = .4249, within 5 sigma.
    _, stats = fapm_prune_tensor(w, ft, keep=0.4)
    share = math.erfc(1 / math.sqrt(math.pi))
    assert stats.positive_ratio == pytest.approx(share, abs=5 * (share * (1 - share) / 1e5) ** 0.5)


def test_mask_commutes_with_scaling_signs_transposition_and_permutation() -> None:
    w, ft = (x.view(60, 50) for x in moved(3000))
    kept = mask(w, ft, 0.2)
    assert torch.equal(mask(w * 8, ft * 8, 0.2), kept)
    signs = torch.where(torch.arange(3000).view(60, 50) % 3 == 0, -1.0, 1.0)
    assert torch.equal(mask(w * signs, ft * signs, 0.2), kept)
    assert torch.equal(mask(w.T, ft.T, 0.2), kept.T)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mask(w[order], ft[order], 0.2), kept[order])


def test_bf16_trap_and_its_cure() -> None:
    """Updates of 2.5e-4 of the weights' deviation: bf16 holds none at weights above the mean, fp32 all."""
    w, ft = moved(200_000, scale=2.5e-4)
    base = w.bfloat16()
    trapped = fapm_prune_tensor(base, (base.float() + (ft - w)).bfloat16(), keep=0.1)[1]
    assert trapped.effective_density == 0.0
    assert 0.05 < trapped.moved_ratio < 0.07
    assert fapm_prune_tensor(w, ft, keep=0.1)[1].effective_density == pytest.approx(0.1, abs=1e-5)
    # Scores in fp32, stored in bf16: the cast takes the update away again, and the count says so.
    cast = fapm_prune_tensor(base, base.float() + (ft - w), keep=0.1)[1]
    assert cast.effective_density < 0.01
    wide = fapm_prune_tensor(base, base.float() + (ft - w), keep=0.1, out_dtype=torch.float32)
    assert wide[0].dtype == torch.float32
    assert wide[1].effective_density == pytest.approx(0.1, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_entry_is_one_of_both(dtype: torch.dtype) -> None:
    w, ft = moved(5000, dtype=dtype)
    out, stats = fapm_prune_tensor(w.view(50, 100), ft.view(50, 100), keep=0.3, chunk=777)
    out = out.flatten()
    assert out.dtype == dtype
    assert bool(((out == w) | (out == ft)).all())
    assert stats.effective_density * 5000 == pytest.approx(int((out != w).sum()))
    assert stats.moved_ratio * 5000 == pytest.approx(int((ft != w).sum()))


def test_choice_is_exact_where_a_sum_is_not() -> None:
    """In bf16 1 + (-0.001 - 1) = 0; the choice gives -0.001."""
    w, ft = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([-0.001], dtype=torch.bfloat16)
    assert float(w + (ft - w)) == 0.0
    assert torch.equal(fapm_prune_tensor(w, ft, keep=1.0)[0], ft)


def test_baselines_by_hand() -> None:
    """|dW| = .5, .5, .25, 1: magnitude keeps entries 3 and 0 (a tie, lowest index); the smallest relative
    changes are entries 2 and 1; WiSE-FT goes half of the way everywhere.
    """
    w, ft = torch.tensor(W), torch.tensor(FT)
    for method, expected in {
        "magnitude": [1.5, -2.0, 4.0, 1.5],
        "ties": [1.5, -2.0, 4.0, 1.5],
        "relative": [1.0, -2.5, 4.25, 0.5],
        "wise_ft": [1.25, -2.25, 4.125, 1.0],
    }.items():
        assert fapm_prune_tensor(w, ft, keep=0.5, method=method)[0].tolist() == expected
    assert fapm_prune_tensor(w, ft, keep=0.5, method="wise_ft")[1].kept_energy == 0.25
    assert torch.equal(
        fapm_prune_tensor(w, ft, keep=0.5, coefficient=0.0)[0], torch.tensor([1.5, -2.0, 4.0, 1.5])
    )


def test_dare_keeps_a_random_share_and_rescales_it() -> None:
    """The rescaled task vector has the whole one's mean: 6 sigma of 50,000 entries at keep .1."""
    w = torch.zeros(50_000) + 1.0
    ft = w + 1.0
    out, stats = fapm_prune_tensor(w, ft, keep=0.1, method="dare", seed=5)
    assert stats.num_kept == int((out != w).sum()) == 5000
    assert float(out.max()) == pytest.approx(11.0)
    first_half = int((out != w)[:25_000].sum())
    assert abs(first_half - 2500) < 6 * (5000 * 0.25) ** 0.5
    other = fapm_prune_tensor(w, ft, keep=0.1, method="dare", seed=6)[0]
    assert not torch.equal(out, other)


def test_all_zero_base_is_ranked_by_magnitude() -> None:
    out, stats = fapm_prune_tensor(torch.zeros(4), torch.tensor([1.0, -3.0, 2.0, 0.5]), keep=0.5)
    assert out.tolist() == [0.0, -3.0, 2.0, 0.0]
    assert stats.by_magnitude


def test_nothing_moved_and_nothing_there() -> None:
    w, _ = moved(100)
    out, stats = fapm_prune_tensor(w, w, keep=0.1)
    assert torch.equal(out, w)
    assert (stats.moved_ratio, stats.effective_density, stats.kept_energy) == (0.0, 0.0, 1.0)
    assert fapm_prune_tensor(torch.empty(0, 3), torch.empty(0, 3))[0].shape == (0, 3)
    assert fapm_prune_tensor(torch.tensor(1.0), torch.tensor(2.0))[0].item() == 1.0


def test_statistics_are_plain_values() -> None:
    found = fapm_prune_tensor(torch.ones(3), torch.zeros(3), keep=0.0)[1].as_dict()
    assert found["threshold"] == "inf"
    assert found["path"] == "none"


def test_wrong_input() -> None:
    w, ft = moved(10)
    with pytest.raises(ValueError, match="keep must lie in"):
        fapm_prune_tensor(w, ft, keep=20)
    with pytest.raises(ValueError, match="method must be one of"):
        fapm_prune_tensor(w, ft, method="wanda")
    with pytest.raises(ValueError, match="both tensors must have one shape"):
        fapm_prune_tensor(w, ft[:9])
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        fapm_prune_tensor(w, ft, chunk=0)
    with pytest.raises(TypeError, match="must be a float tensor"):
        fapm_prune_tensor(w, ft.to(torch.int8))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("keep", [0.0, 0.1, 1.0])
def test_values_that_are_not_finite(bad: float, side: int, keep: float) -> None:
    tensors = [x.clone() for x in moved(100)]
    tensors[side][3] = bad
    with pytest.raises(ValueError, match="NaN or inf among the values: .* A diverged training"):
        fapm_prune_tensor(*tensors, keep=keep)


def test_difference_that_overflows() -> None:
    with pytest.raises(ValueError, match="overflows fp32"):
        fapm_prune_tensor(torch.tensor([1.0, 1.0]), torch.tensor([1e25, 1.0]), keep=0.5)
