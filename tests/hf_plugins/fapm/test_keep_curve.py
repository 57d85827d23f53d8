"""Many keeps at once equal one keep at a time."""

import numpy as np
import pytest
import torch

from hf_plugins.fapm import fapm_prune_tensor, keep_curve
from hf_plugins.fapm.keep_curve import level_chunks
from hf_plugins.fapm.score import Rule, Scorer, mean_magnitude
from tests.hf_plugins.fapm.tiny import moved, pair

KEEPS = (0.0, 0.05, 0.1, 0.4, 0.8, 1.0)


def cases() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    tied = torch.tensor([1.0, -1.0, 2.0, -2.0] * 250)
    return {"gaussian": moved(5000), "bf16": moved(5000, dtype=torch.bfloat16), "ties": (tied, tied + 0.5)}


@pytest.mark.parametrize("case", cases())
@pytest.mark.parametrize("chunk", [333, 100_000])
def test_curve_equals_single_prunings(case: str, chunk: int) -> None:
    w, ft = cases()[case]
    rows = keep_curve(pair(w, ft), KEEPS, chunk=chunk).rows()
    for keep, row in zip(KEEPS, rows, strict=True):
        out, stats = fapm_prune_tensor(w, ft, keep=keep)
        assert row["keep"] == keep
        assert row["effective_density"] == pytest.approx(stats.effective_density)
        assert row["kept_energy"] == pytest.approx(stats.kept_energy, rel=1e-5)
        kept = out != w
        share = ((ft.float() - w.float()).abs() / w.float().abs())[kept]
        expected = float(share.double().sum()) / max(stats.num_kept, 1)
        assert row["mean_relative_change"] == pytest.approx(expected, rel=1e-5)


def test_levels_are_the_masks() -> None:
    w, ft = moved(5000)
    each = pair(w, ft)
    scorer = Scorer(each, Rule(), mu=mean_magnitude(each)[0], chunk=512)
    levels = np.concatenate([level for _, level in level_chunks(scorer, KEEPS)])
    for index, keep in enumerate(KEEPS):
        assert np.array_equal(levels <= index, (fapm_prune_tensor(w, ft, keep=keep)[0] != w).numpy())


def test_tensors_add_up() -> None:
    """Two tensors of 1,000 and 3,000 entries: densities weigh by size, energies by norm."""
    a, b = pair(*moved(1000)), pair(*moved(3000, seed=1, scale=1e-1))
    one, two = keep_curve(a, (0.1,)), keep_curve(b, (0.1,))
    both = one.add(two)
    assert both.numel == 4000
    assert both.rows()[0]["effective_density"] == pytest.approx(400 / 4000)
    energy = (one.energy + two.energy)[0] / (one.total_energy + two.total_energy)
    assert both.rows()[0]["kept_energy"] == pytest.approx(energy)


def test_stored_dtype_decides_what_changes() -> None:
    w, ft = moved(20_000, scale=2.5e-4)
    each = pair(w.bfloat16(), w.bfloat16().float() + (ft - w))
    assert keep_curve(each, (0.1,), dtype=torch.float32).rows()[0]["effective_density"] == 0.1
    assert keep_curve(each, (0.1,)).rows()[0]["effective_density"] < 0.01


@pytest.mark.parametrize("keeps", [(), (0.2, 0.1), (0.1, 0.1), (0.5, 2.0)])
def test_wrong_grid(keeps: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="different shares in ascending order|keep must lie in"):
        keep_curve(pair(*moved(10)), keeps)


def test_values_that_are_not_finite() -> None:
    w, ft = moved(100)
    ft[3] = torch.nan
    with pytest.raises(ValueError, match="NaN or inf among the values"):
        keep_curve(pair(w, ft), (0.1,))
