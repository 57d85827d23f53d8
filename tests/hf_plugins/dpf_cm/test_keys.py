import math

import numpy as np
import pytest
import torch

from hf_plugins.dpf_cm.keys import (
    angle_std,
    best_match,
    fit_whitening,
    prefix_ends,
    prefix_means,
    sign_projection,
    sketch,
    sketch_cosine,
)
from tests.hf_plugins.dpf_cm.reference import prefix_mean, whiten


def test_prefix_means_against_the_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 7, 5, generator=generator)
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 0, 1, 1], [0] * 7])
    ends = torch.tensor([[7, 3], [7, 4], [7, 0]])
    found = prefix_means(hidden, mask, ends)
    for row in range(3):
        for k in range(2):
            expected = prefix_mean(hidden[row].numpy(), mask[row].tolist(), int(ends[row, k]))
            np.testing.assert_allclose(found[row, k].numpy(), expected, atol=1e-6)
    assert prefix_means(hidden.bfloat16(), mask, ends).dtype == torch.float32


def test_whitening_against_eigenvectors() -> None:
    rng = np.random.default_rng(0)
    fit = rng.normal(size=(60, 8)) * np.array([9, 5, 3, 1, 1, 1, 1, 1.0]) + 4
    states = rng.normal(size=(5, 8)) + 4
    found = fit_whitening(torch.tensor(fit), num_directions=3)
    np.testing.assert_allclose(found(torch.tensor(states)).numpy(), whiten(states, fit, 3), atol=1e-4)
    assert found.directions_RH.shape == (3, 8)
    assert fit_whitening(torch.tensor(fit[:3]), num_directions=9).directions_RH.shape[0] == 2
    # What is the mean itself has no direction left.
    assert float(found(found.mean_H[None]).norm()) < 1e-3
    plain = fit_whitening(torch.tensor(fit), num_directions=0)
    centred = states - fit.mean(0)
    np.testing.assert_allclose(
        plain(torch.tensor(states)).numpy(), centred / np.linalg.norm(centred, axis=1)[:, None], atol=1e-5
    )


def test_common_direction_hides_differences_until_it_is_gone() -> None:
    """Two orthogonal vectors behind a common offset of length 10: raw cosine 100/101, centred -1 or 0."""
    common = torch.zeros(1, 6)
    common[0, 0] = 10.0
    a, b = torch.eye(6)[1:2] + common, torch.eye(6)[2:3] + common
    raw = torch.nn.functional.cosine_similarity(a, b).item()
    assert raw == pytest.approx(100 / 101)
    generator = torch.Generator().manual_seed(0)
    white = fit_whitening(common + torch.randn(200, 6, generator=generator), num_directions=0)
    assert abs(float((white(a) * white(b)).sum())) < 0.3


def test_best_match() -> None:
    keys = torch.eye(3)
    cosines, places = best_match(torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.0, 1.0]]), keys)
    assert places.tolist() == [1, 2]
    torch.testing.assert_close(cosines, torch.tensor([0.8, 1.0]))
    for row in range(2):
        # A single prompt takes another path.
        one = best_match(torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])[row : row + 1], keys)
        torch.testing.assert_close(one, (cosines[row : row + 1], places[row : row + 1]))
    cosines, places = best_match(torch.ones(2, 3), torch.zeros(0, 3))
    assert cosines.tolist() == [-math.inf] * 2
    assert places.tolist() == [-1, -1]


def test_ends_by_hand() -> None:
    """10 tokens of prompt and 8 of answer: 10, 12, 14, 16; shares that fall together count once."""
    assert prefix_ends(10, 18, (0.0, 0.25, 0.5, 0.75)) == [10, 12, 14, 16]
    assert prefix_ends(10, 11, (0.0, 0.25, 0.5)) == [10, 11]
    assert prefix_ends(5, 15, (1.0,)) == [15]
    # 0.7 * 10 is 7.000000000000001 in binary.
    assert prefix_ends(0, 10, (0.7,)) == [7]


def test_sketch_estimates_the_cosine() -> None:
    """At cosine 0.8 and 4096 bits the angle's standard deviation is pi*sqrt(.2048*.7952/4096) = 0.0198."""
    assert angle_std(0.8, 4096) == pytest.approx(0.0198, abs=2e-4)
    assert angle_std(0.8, 3584) == pytest.approx(0.021, abs=3e-4)
    generator = torch.Generator().manual_seed(0)
    a = torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0)
    b = torch.randn(64, generator=generator)
    b = torch.nn.functional.normalize(b - (b @ a) * a, dim=0)
    pair = torch.stack([a, 0.8 * a + 0.6 * b])
    codes = sketch(pair, sign_projection(b"s" * 32, 64, 4096))
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(2))
    angle = math.acos(float(sketch_cosine((codes[0] * codes[1]).sum())))
    # Six standard deviations: false alarm below 1e-8; Rademacher rows at width 64 add a little.
    assert abs(angle - math.acos(0.8)) < 0.15
    assert float(sketch_cosine(torch.tensor(1.0))) == pytest.approx(1.0)
    assert float(sketch_cosine(torch.tensor(0.0))) == pytest.approx(0.0, abs=1e-6)


def test_projection_is_secret_fair_and_repeatable() -> None:
    one, again = sign_projection(b"a" * 32, 64, 512), sign_projection(b"a" * 32, 64, 512)
    other = sign_projection(b"b" * 32, 64, 512)
    assert (one == again).all()
    # Agreement of two secrets is a fair coin: 32,768 flips, six standard deviations are 0.017.
    assert abs(float((one == other).float().mean()) - 0.5) < 0.017
    assert abs(float(one.float().mean())) < 0.034
    assert set(one.unique().tolist()) == {-1, 1}
    with pytest.raises(ValueError, match="needs 16 bytes or more; got .*3. Use secrets.token_bytes"):
        sign_projection(b"abc", 4, 4)
