"""Transform and overlap matrices."""

import pytest
import torch

from hf_plugins.embed_parrot.spectral import (
    band_overlap,
    dct_matrix,
    keyed_overlap,
    spectral_filter,
    window_overlap,
)
from tests.hf_plugins.embed_parrot import reference


@pytest.mark.parametrize("dim", [1, 2, 7, 64, 1024])
def test_transform_is_orthonormal(dim: int) -> None:
    """Built in float64: 1024 products of rounding 1e-16 stay below 1e-12."""
    matrix = dct_matrix(dim)
    eye = torch.eye(dim, dtype=torch.float64)
    assert (matrix @ matrix.T - eye).abs().max() < 1e-12


def test_transform_agrees_with_loops() -> None:
    values = [0.5, -1.25, 3.0, 2.0, -0.75]
    expected = torch.tensor(reference.dct(values), dtype=torch.float64)
    torch.testing.assert_close(dct_matrix(5) @ torch.tensor(values, dtype=torch.float64), expected)


def test_identity_overlap_changes_nothing() -> None:
    eye = torch.eye(96, dtype=torch.float64)
    assert (spectral_filter(eye) - eye).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["window", "band"])
def test_filter_agrees_with_loops(kind: str) -> None:
    """Transform a row, overlap its spectrum, transform back."""
    values = [0.5, -1.25, 3.0, 2.0, -0.75, 1.5]
    spectrum = reference.dct(values)
    changed = reference.window_average(spectrum, 3) if kind == "window" else spectrum[:2] + [0.0] * 4
    expected = torch.tensor(reference.inverse_dct(changed), dtype=torch.float64)
    overlap = window_overlap(6, 3) if kind == "window" else band_overlap(6, 2)
    torch.testing.assert_close(torch.tensor(values, dtype=torch.float64) @ spectral_filter(overlap), expected)


def test_band_has_the_rank_it_keeps() -> None:
    assert int(torch.linalg.matrix_rank(spectral_filter(band_overlap(32, 4)))) == 4


def test_key_permutes_and_signs_inside_windows() -> None:
    matrix = keyed_overlap(10, 4, key=5)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(10, dtype=torch.float64))
    outside = torch.block_diag(torch.ones(4, 4), torch.ones(4, 4), torch.ones(2, 2)) == 0
    assert (matrix[outside] == 0).all()
    assert torch.equal(matrix, keyed_overlap(10, 4, key=5))
    assert not torch.equal(matrix, keyed_overlap(10, 4, key=6))


@pytest.mark.parametrize("value", [0, 9])
def test_sizes_in_range(value: int) -> None:
    with pytest.raises(ValueError, match=r"keep must lie in 1 \.\. .*8"):
        band_overlap(8, value)
    with pytest.raises(ValueError, match=r"window must lie in 1 \.\. .*8"):
        window_overlap(8, value)
