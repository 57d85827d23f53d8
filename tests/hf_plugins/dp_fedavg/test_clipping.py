"""Whole-vector clipping: the bound is the bound, whatever comes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_plugins.dp_fedavg import clip_update
from hf_plugins.dp_fedavg.clipping import update_norm
from tests.hf_plugins.dp_fedavg import reference


def test_by_hand() -> None:
    """[3, 4] has norm 5; S = 1 scales it to [0.6, 0.8]."""
    clipped, norm = clip_update([torch.tensor([3.0, 4.0])], 1.0)
    assert norm == 5.0
    torch.testing.assert_close(clipped[0], torch.tensor([0.6, 0.8]), atol=2e-6, rtol=0)


def test_norm_is_over_all_tensors_and_0d_ones_are_clipped() -> None:
    """2 tensors of norm 3 and 4 are one vector of norm 5; a 0-d update of 100 with S = 1 becomes 1."""
    clipped, norm = clip_update([torch.tensor([[3.0]]), torch.tensor(4.0)], 1.0)
    assert norm == 5.0
    assert [round(float(c), 5) for c in clipped] == [0.6, 0.8]
    assert clipped[1].shape == ()
    assert float(clip_update([torch.tensor(100.0)], 1.0)[0][0]) == pytest.approx(1.0, abs=2e-6)


def test_inside_the_ball_nothing_changes_bit_by_bit() -> None:
    vector = torch.tensor([0.3, 0.4])
    assert torch.equal(clip_update([vector], float(vector.norm()) + 1e-6)[0][0], vector)
    assert torch.equal(clip_update([vector], math.inf)[0][0], vector)


def test_zero_empty_whole_numbers_nan() -> None:
    assert clip_update([torch.zeros(3)], 1.0)[1] == 0.0
    assert clip_update([], 1.0) == ([], 0.0)
    assert clip_update([torch.zeros(0)], 1.0)[0][0].shape == (0,)
    counter, real = clip_update([torch.tensor([10**9]), torch.tensor([2.0])], 1.0)[0]
    assert counter.tolist() == [0.0]
    assert float(real[0]) == pytest.approx(1.0, abs=2e-6)
    for bad in (math.nan, math.inf):
        clipped, norm = clip_update([torch.tensor([bad, 1.0]), torch.ones(2)], 1.0)
        assert not any(c.any() for c in clipped)
        assert not norm < math.inf


def test_values_at_the_end_of_the_range() -> None:
    """float64 entries near 1e300 overflow when squared; their norm is sqrt(2) 1e300 all the same."""
    huge = torch.tensor([1e300, 1e300], dtype=torch.float64)
    assert update_norm([huge]) == pytest.approx(math.sqrt(2) * 1e300, rel=1e-12)
    assert float(clip_update([huge], 1.0)[0][0].norm()) == pytest.approx(1.0, abs=2e-6)
    tiny = torch.tensor([1e-300, 0.0], dtype=torch.float64)
    assert update_norm([tiny]) == pytest.approx(1e-300, rel=1e-12)


TENSORS = st.sampled_from(["float32", "float64", "bfloat16", "float16", "int64", "bool"])


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    shapes=st.lists(st.sampled_from([(), (0,), (1,), (3,), (2, 5)]), min_size=1, max_size=4),
    dtypes=st.lists(TENSORS, min_size=4, max_size=4),
    scale=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 300.0, 1e30]),
    bound=st.sampled_from([1e-3, 0.2, 1.0, 50.0]),
    seed=st.integers(0, 10**6),
    bad=st.sampled_from([None, None, math.nan, -math.inf]),
)
def test_removing_a_user_moves_the_sum_by_at_most_s(
    shapes: list, dtypes: list, scale: float, bound: float, seed: int, bad: float | None
) -> None:
    generator = torch.Generator().manual_seed(seed)
    update = [
        (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(getattr(torch, dtype))
        for shape, dtype in zip(shapes, dtypes, strict=False)
    ]
    if bad is not None and update[0].is_floating_point() and update[0].numel():
        update[0].reshape(-1)[0] = bad
    clipped, _ = clip_update(update, bound)
    assert all(c.dtype == torch.float32 and c.shape == u.shape for c, u in zip(clipped, update, strict=True))
    assert reference.norm([float(x) for c in clipped for x in c.reshape(-1)]) <= bound


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    values=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8), bound=st.sampled_from([0.1, 1.0, 100.0])
)
def test_against_reference(values: list[float], bound: float) -> None:
    clipped = clip_update([torch.tensor(values, dtype=torch.float64)], bound)[0][0]
    expected = torch.tensor(reference.clip(values, bound)).float()
    torch.testing.assert_close(clipped, expected, atol=3e-6 * bound, rtol=3e-6)


def test_bound_must_be_positive() -> None:
    for bound in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="clipping_norm must be > 0"):
            clip_update([torch.ones(1)], bound)
