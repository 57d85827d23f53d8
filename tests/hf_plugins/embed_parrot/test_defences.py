"""Defences: algebra, noise laws, what an attacker who adapts still sees."""

import math

import pytest
import torch

from hf_plugins.embed_parrot.defences import (
    DctOverlap,
    Defence,
    DxPrivacy,
    GaussianNoise,
    Int8Wire,
    NoDefence,
    RandomPermutation,
    parse_defence,
)
from hf_plugins.embed_parrot.inversion import HotmapEmbedInversion


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _table(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=_generator(1)) * 0.02


def test_window_of_one_is_no_change() -> None:
    table = _table(50, 64)
    changed = DctOverlap(window=1)(table, _generator())
    assert (changed - table).norm() / table.norm() < 1e-6


@pytest.mark.parametrize(
    "defence",
    [
        DctOverlap(keep=4),
        DctOverlap(keep=64),
        DctOverlap(window=8),
        DctOverlap(window=32),
        DctOverlap(window=8, key=3),
        Int8Wire(),
        RandomPermutation(),
    ],
    ids=str,
)
def test_adaptive_reads_all_and_naive_no_more(defence: Defence) -> None:
    """Rank 4 of 256 still tells 500 random rows apart: a fixed map is a codebook."""
    table, ids = _table(500, 256), torch.arange(500)
    seen = defence(table, _generator())
    naive = (HotmapEmbedInversion(table)(seen) == ids).double().mean()
    view = defence.adaptive_view()
    adaptive = HotmapEmbedInversion(view.codebook(table), canonical=view.canonical)
    share = (adaptive(seen) == ids).double().mean()
    assert share == 1.0
    assert naive <= share


def test_rank_four_of_1024_hides_from_naive_only() -> None:
    table, ids = _table(2000, 1024), torch.arange(2000)
    defence = DctOverlap(keep=4)
    seen = defence(table, _generator())
    assert (HotmapEmbedInversion(table)(seen) == ids).double().mean() < 0.1
    assert (HotmapEmbedInversion(defence.adaptive_view().codebook(table))(seen) == ids).all()


@pytest.mark.parametrize("width", [256, 1024])
def test_gaussian_hides_beyond_the_predicted_noise(width: int) -> None:
    """Nearest-row decoding falls through 50 % near ``sigma/s = sqrt(d / (2 ln V))``: the right row scores d
    s^2, the best of V wrong ones about ``s sigma sqrt(d) sqrt(2 ln V)``.

    At 1/1.5 of that ratio and at 1.5 times it the share lies on either side of one half. 400 draws each; the
    shares are 0.99 and 0.05 or so, 15 standard deviations from 0.5: a false alarm is far below 1e-6.
    """
    num_rows, num_draws = 2000, 400
    table = torch.randn(num_rows, width, generator=_generator(1))
    ids = torch.randint(0, num_rows, (num_draws,), generator=_generator(2))
    critical = math.sqrt(width / (2 * math.log(num_rows)))

    def share(ratio: float) -> float:
        seen = GaussianNoise(ratio=ratio)(table[ids], _generator(3))
        return float((HotmapEmbedInversion(table)(seen) == ids).double().mean())

    assert share(critical / 1.5) > 0.5 > share(critical * 1.5)


def test_gaussian_scales_with_the_states() -> None:
    noise = GaussianNoise(ratio=0.5).at_scale(4.0)(torch.zeros(400, 100), _generator())
    # The spread of 40,000 draws is known to 0.4 %; 5 % is 14 standard deviations.
    assert float(noise.std()) == pytest.approx(2.0, rel=0.05)
    assert float(noise.norm(dim=1).mean()) == pytest.approx(
        GaussianNoise(ratio=0.5, scale=4.0).noise_length(100), rel=0.05
    )


@pytest.mark.parametrize("eta", [2.0, 50.0])
def test_dx_noise_has_the_length_it_promises(eta: float) -> None:
    """Gamma(d, 1/eta) has mean d/eta and spread sqrt(d)/eta: the mean of 4,000 is known to 0.2 % at d = 64,
    so 2 % is ten standard deviations.
    """
    noise = DxPrivacy(eta=eta)(torch.zeros(4000, 64), _generator())
    lengths = noise.norm(dim=1)
    assert float(lengths.mean()) == pytest.approx(64 / eta, rel=0.02)
    assert DxPrivacy(eta=eta).noise_length(64) == 64 / eta
    assert float(lengths.std()) == pytest.approx(math.sqrt(64) / eta, rel=0.1)
    # One radius for each token; fp32 lets a few of 4,000 coincide.
    assert len(lengths.unique()) > 3900


def test_dx_direction_is_uniform() -> None:
    """The mean of 4,000 unit vectors in 16 dimensions has length about 1/63; 0.06 is four times that."""
    noise = DxPrivacy(eta=3.0)(torch.zeros(4000, 16), _generator())
    assert float((noise / noise.norm(dim=1, keepdim=True)).mean(0).norm()) < 0.06


def test_int8_is_off_by_half_a_step_at_most() -> None:
    x = torch.randn(30, 40, generator=_generator())
    error = (Int8Wire()(x, _generator()) - x).abs()
    assert (error <= x.abs().amax(1, keepdim=True) / 127 / 2 * 1.0001).all()
    assert torch.equal(Int8Wire()(torch.zeros(2, 3), _generator()), torch.zeros(2, 3))


def test_permutation_is_fresh_for_each_vector() -> None:
    x = torch.arange(32.0).expand(20, 32)
    seen = RandomPermutation()(x, _generator())
    assert torch.equal(seen.sort(1).values, x)
    assert len({tuple(row.tolist()) for row in seen}) == 20


def test_dtype_is_kept() -> None:
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    for defence in (
        DctOverlap(keep=4),
        GaussianNoise(),
        DxPrivacy(),
        Int8Wire(),
        RandomPermutation(),
        NoDefence(),
    ):
        assert defence(x, _generator()).dtype == torch.bfloat16


def test_noise_comes_from_the_generator_alone() -> None:
    x = torch.zeros(4, 8)
    for defence in (GaussianNoise(), DxPrivacy(), RandomPermutation()):
        first = defence(x + torch.arange(8.0), _generator(7))
        assert torch.equal(first, defence(x + torch.arange(8.0), _generator(7)))
        assert not torch.equal(first, defence(x + torch.arange(8.0), _generator(8)))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("none", NoDefence()),
        ("dct:keep=64", DctOverlap(keep=64)),
        ("dct:window=8,key=3", DctOverlap(window=8, key=3)),
        ("dct:window=8@cut", DctOverlap(window=8, site="cut")),
        ("gauss:0.5", GaussianNoise(ratio=0.5)),
        ("gauss:ratio=2@embedding", GaussianNoise(ratio=2.0, site="embedding")),
        ("dx:40", DxPrivacy(eta=40.0)),
        ("int8", Int8Wire()),
        ("permute", RandomPermutation()),
    ],
)
def test_short_forms(spec: str, expected: Defence) -> None:
    assert parse_defence(spec) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("noise:3", "unknown defence .*noise:3.*; known kinds are .*none, dct"),
        ("gauss:sigma=3", "no option .*sigma=3.* for gauss.*; its options: .*ratio"),
        ("int8:4", "; its options: .*none"),
        ("gauss:much", "'much'.* is not a number for .*ratio"),
        ("gauss:0", "the noise ratio must be > 0; got .*0.0"),
        ("dx:-1", "eta must be > 0; got .*-1.0"),
        ("dct", "give either keep or window, a positive number"),
        ("dct:keep=3,window=2", "give either keep or window, a positive number"),
        ("dct:keep=3,key=1", "key permutes frequencies inside windows"),
        ("int8@wire", "site must be 'embedding' or 'cut'; got .*'wire'"),
    ],
)
def test_wrong_short_forms(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_defence(spec)


def test_base_class_does_nothing_silently() -> None:
    with pytest.raises(NotImplementedError, match="does not say how it changes vectors"):
        Defence()(torch.zeros(1, 2), _generator())
