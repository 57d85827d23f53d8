"""The offset branches: cost, layout, initial size, precision (acceptance facts 6 and 11)."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mm_plugins.lau.offsets import DySampleBranch, OffsetBranch, ZeroBranch, spread_cells


@pytest.mark.parametrize(
    ("k", "parameters", "gmac"),
    [(2, 140288, 0.505), (3, 151808, 0.547), (4, 167936, 0.605), (5, 188672, 0.679)],
)
def test_cost_is_that_of_the_papers_table(k: int, parameters: int, gmac: float) -> None:
    """Both branches, 512 input channels, 128 in between; multiply-adds at 60x60 (480x480 at stride 8)."""
    branch = OffsetBranch(512, k)
    assert sum(p.numel() for p in branch.parameters()) == parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        branch(torch.zeros(1, 512, 60, 60))
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, abs=5e-4)


def test_spread_is_pixel_shuffle_for_one_factor_and_defined_for_two() -> None:
    x = torch.arange(2 * 18 * 2 * 3, dtype=torch.float32).view(2, 18, 2, 3)
    assert torch.equal(spread_cells(x, (3, 3)), torch.nn.functional.pixel_shuffle(x, 3))
    # One cell, k = (2, 3): channels fill the block row by row.
    assert spread_cells(torch.arange(6.0).view(1, 6, 1, 1), (2, 3)).tolist() == [[[[0, 1, 2], [3, 4, 5]]]]


@pytest.mark.parametrize("kind", [OffsetBranch, DySampleBranch])
def test_first_channels_are_vertical(kind: type) -> None:
    branch = kind(4, (2, 3), num_groups=3)
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.zero_()
        if kind is OffsetBranch:
            branch.vertical[2].weight.fill_(1.0)
            branch.vertical[0].weight.fill_(1.0)
        else:
            branch.offset.bias[: 3 * 6] = 4.0
    out = branch(torch.ones(2, 4, 5, 5))
    assert out.shape == (2, 6, 10, 15)
    assert (out[:, :3] > 0).all()
    assert (out[:, 3:] == 0).all()


def test_initial_offsets_are_small_large_or_zero() -> None:
    """Xavier starts with shifts of about a cell, as the authors' release does; small within a tenth."""
    torch.manual_seed(0)
    feature = torch.randn(2, 512, 12, 12).relu()
    deviation = {
        init: OffsetBranch(512, 4, init=init)(feature).std().item() for init in ("small", "xavier", "zero")
    }
    assert 0 < deviation["small"] < 0.1
    assert 0.4 < deviation["xavier"] < 1.6
    assert deviation["zero"] == 0
    assert 0 < DySampleBranch(512, 4)(feature).std().item() < 0.1


def test_bounded_offsets() -> None:
    """limit * tanh(o / limit): slope 1 at 0, never beyond the limit."""
    torch.manual_seed(0)
    feature = torch.randn(1, 16, 6, 6) * 20
    free, bounded = OffsetBranch(16, 2, init="xavier"), OffsetBranch(16, 2, init="xavier", max_offset=0.5)
    bounded.load_state_dict(free.state_dict())
    assert free(feature).abs().max() > 0.5
    torch.testing.assert_close(bounded(feature), 0.5 * torch.tanh(free(feature) / 0.5))


def test_offsets_stay_fp32_under_autocast() -> None:
    feature = torch.randn(1, 16, 6, 6)
    for branch in (OffsetBranch(16, 2), DySampleBranch(16, 2, dynamic_scope=True), ZeroBranch(2)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert branch(feature.bfloat16()).dtype == torch.float32


def test_dysample_offset_is_a_quarter_of_its_convolution() -> None:
    torch.manual_seed(0)
    feature, branch = torch.randn(1, 8, 3, 3), DySampleBranch(8, 2)
    wanted = spread_cells(0.25 * branch.offset(feature), (2, 2))
    torch.testing.assert_close(branch(feature), wanted)
    scoped = DySampleBranch(8, 2, dynamic_scope=True)
    scoped.offset.load_state_dict(branch.offset.state_dict())
    # The scope starts at sigmoid(0)/2 = 1/4.
    torch.testing.assert_close(scoped(feature), wanted)


def test_zero_branch_has_nothing_to_learn() -> None:
    branch = ZeroBranch((2, 3), num_groups=2)
    branch.init_weights()
    assert list(branch.parameters()) == []
    assert torch.equal(branch(torch.ones(1, 5, 2, 2)), torch.zeros(1, 4, 4, 6))


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="init must be one of small, xavier, zero; got 'big'"):
        OffsetBranch(8, 2, init="big")
    with pytest.raises(ValueError, match="max_offset must be > 0 cells"):
        OffsetBranch(8, 2, max_offset=0.0)
