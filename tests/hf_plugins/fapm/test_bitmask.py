"""The sparse form: bits of masks of any length, flips that are their own inverse."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_plugins.fapm.bitmask import BitPacker, byte_ranges, flipped, flips, placed, unpacked
from tests.hf_plugins.fapm.tiny import moved


@given(st.lists(st.lists(st.booleans(), max_size=20), max_size=8))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_pieces_pack_as_the_whole(pieces: list[list[bool]]) -> None:
    packer = BitPacker()
    parts = [packer.push(np.array(piece, dtype=bool)) for piece in pieces]
    whole = np.array([bit for piece in pieces for bit in piece], dtype=bool)
    assert np.array_equal(np.concatenate([*parts, packer.rest()]), np.packbits(whole))


def test_part_of_a_packed_mask() -> None:
    mask = np.random.default_rng(0).random(50) < 0.5
    bits = np.packbits(mask)
    assert np.array_equal(unpacked(bits[1:], 11, 29), mask[11:29])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_flips_there_and_back(dtype: torch.dtype) -> None:
    w, ft = moved(100, dtype=dtype)
    mask = np.arange(100) % 3 == 0
    out = torch.where(torch.from_numpy(mask), ft, w)
    found = flips(w, out, mask)
    assert len(found) == 34
    assert torch.equal(flipped(w, mask, found), out)
    assert torch.equal(flipped(out, mask, found), w)


def test_placed_values_take_their_dtype() -> None:
    w = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    out = placed(w, np.array([False, True, False]), torch.tensor([2.001]))
    assert out.tolist() == [1.0, pytest.approx(2.001), 3.0]
    assert out.dtype == torch.float32
    assert w.tolist() == [1.0, 2.0, 3.0]


def test_ranges_begin_at_whole_bytes() -> None:
    assert list(byte_ranges(20, 5)) == [(0, 8), (8, 16), (16, 20)]
