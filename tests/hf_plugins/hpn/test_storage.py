"""Anchors: bit-exact, as many files as said; states that a kill cannot tear."""

import math
from pathlib import Path

import pytest
import torch

from hf_plugins.hpn.storage import AnchorTrajectory, load_state, save_state, weighted_mean


def _trajectory(num: int = 7) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(501, generator=generator)
    return [start + 1e-3 * r * torch.randn(501, generator=generator) for r in range(num)]


@pytest.mark.parametrize("store", ["all", "diff"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_restore_is_bit_exact(tmp_path: Path, store: str, dtype: str) -> None:
    anchors = AnchorTrajectory(tmp_path, store=store, dtype=dtype)
    vectors = _trajectory()
    vectors[3][:3] = torch.tensor([0.0, -0.0, math.inf])
    for r, vector in enumerate(vectors):
        anchors.put(r, vector)
    for r, vector in enumerate(vectors):
        expected = vector.to(getattr(torch, dtype)).float()
        assert torch.equal(anchors.get(r).view(torch.int32), expected.view(torch.int32))
    assert anchors.starts(7) == list(range(7))


def test_differences_are_smaller(tmp_path: Path) -> None:
    """A model most of whose parameters stay as they were: the difference is near nothing."""
    vector = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    anchors = AnchorTrajectory(tmp_path, store="diff")
    anchors.put(0, vector)
    moved = vector.clone()
    moved[:100] += 1
    anchors.put(1, moved)
    sizes = [(tmp_path / f"anchor_{r:06d}.pt").stat().st_size for r in (0, 1)]
    assert sizes[1] < sizes[0] / 10


@pytest.mark.parametrize(("rounds", "every"), [(10, 3), (9, 3), (1, 5)])
def test_every_n_needs_a_file_for_each_n_rounds(tmp_path: Path, rounds: int, every: int) -> None:
    anchors = AnchorTrajectory(tmp_path, store="every_n", every=every)
    for r in range(rounds):
        anchors.put(r, torch.zeros(3))
    assert len(list(tmp_path.glob("*.pt"))) == math.ceil(rounds / every)
    assert anchors.starts(rounds) == list(range(0, rounds, every))
    assert all(anchors.has(r) for r in anchors.starts(rounds))


def test_figures_travel_in_the_state(tmp_path: Path) -> None:
    anchors = AnchorTrajectory(tmp_path)
    anchors.aggregate[2] = {0: (0.5, 10), 1: (1.0, 30)}
    anchors.local[1] = {1: (0.25, 30)}
    other = AnchorTrajectory(tmp_path)
    other.load_state_dict(anchors.state_dict())
    assert other.aggregate == anchors.aggregate
    assert other.local == anchors.local
    assert other.mean(2) == pytest.approx(0.875)  # (0.5 * 10 + 1.0 * 30) / 40
    assert math.isnan(weighted_mean({}))


def test_a_missing_anchor_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is missing; run the anchor phase again"):
        AnchorTrajectory(tmp_path).get(4)


def test_states_are_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state.pt"
    assert load_state(path) is None
    save_state(path, {"a": torch.ones(2), "b": [1, None, "x"]})
    save_state(path, {"a": torch.zeros(2), "b": {3: 0.5}})
    found = load_state(path)
    assert found is not None
    assert found["b"] == {3: 0.5}
    assert not list(tmp_path.rglob("*.part"))
