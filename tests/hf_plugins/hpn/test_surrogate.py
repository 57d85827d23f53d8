"""The regression over all trials: against plain ridge, and on tasks with a known answer."""

import numpy as np
import pytest
import torch

from hf_plugins.hpn.surrogate import Surrogate, client_features, config_features, normalised_gains
from tests.hf_plugins.hpn import reference


def _encodings(num: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_config_features_by_hand() -> None:
    """Sizes 2 and 3, action (1, 0): (1 | 0 1 | 1 0 0 | 0.2 times their products); a place 0.75 gives
    1, 0.5, 0.25, 0.125."""
    found = config_features(torch.tensor([[1.0, 0.0]]), (2, 3))
    assert found.tolist() == [[1, 0, 1, 1, 0, 0, 0, 0, 0, 0.2, 0, 0]]
    assert config_features(torch.tensor([[0.75]]), (0,)).tolist() == [[1, 0.5, 0.25, 0.125]]
    assert config_features(torch.tensor([[1.0, 0.0]]), (2, 3), pairs=0).shape == (1, 6)


def test_client_features() -> None:
    """Constant, standardised encoding of mean squared norm similar^2, indicator."""
    found = client_features(torch.cat([_encodings(6), torch.ones(6, 1)], dim=1), shared=2, similar=3, own=4)
    assert found.shape == (6, 1 + 5 + 6)
    assert found[:, 0].tolist() == [2.0] * 6
    assert float(found[:, 1:6].square().sum(dim=1).mean()) == pytest.approx(9.0)
    assert float(found[:, 5].abs().max()) == 0.0  # equal for all: says nothing
    assert torch.equal(found[:, 6:], 4 * torch.eye(6, dtype=torch.float64))


def test_equals_plain_ridge_regression() -> None:
    """Grouped trials and the dual solution give the weights of ridge regression over single trials."""
    generator = torch.Generator().manual_seed(0)
    num, sizes = 60, (2, 3)
    clients = torch.randint(3, (num,), generator=generator)
    actions = torch.stack([torch.randint(s, (num,), generator=generator) for s in sizes], dim=1).double()
    gains = torch.randn(num, generator=generator, dtype=torch.float64)
    surrogate = Surrogate(_encodings(3), sizes, ridge=0.7)
    surrogate.fit(clients, actions, gains)
    features = config_features(actions, sizes).numpy()
    rows = client_features(_encodings(3))[clients].numpy()
    weights = reference.ridge(features, rows, gains.numpy(), 0.7)
    design = np.stack([np.outer(f, c).ravel() for f, c in zip(features, rows, strict=True)])
    np.testing.assert_allclose(surrogate.predict(clients, actions).numpy(), design @ weights, atol=1e-9)


def test_finds_personal_optima_in_noise() -> None:
    """Ten clients, 180 configs, 500 uniform trials each, noise of 0.1 against steps of 0.06 between
    neighbours: at least nine right."""
    generator = torch.Generator().manual_seed(0)
    sizes, num = (5, 6, 6), 500
    best = torch.stack([torch.randint(s, (10,), generator=generator) for s in sizes], dim=1)
    clients = torch.arange(10).repeat_interleave(num)
    actions = torch.stack([torch.randint(s, (10 * num,), generator=generator) for s in sizes], dim=1)
    loss = ((actions - best[clients]).abs() / torch.tensor(sizes)).sum(dim=1) / 3
    gains = -loss + 0.1 * torch.randn(10 * num, generator=generator)
    gains = (gains - gains.mean()) / gains.std()  # the penalty is in units of the noise
    surrogate = Surrogate(_encodings(10), sizes)
    surrogate.fit(clients, actions.double(), gains)
    found = surrogate.best(generator=generator)
    assert int((found == best).all(dim=1).sum()) >= 9


def test_continuous_optimum() -> None:
    """Gain -(u - u_k)^2 with u_k = 0.2 and 0.8: a polynomial of degree 3 holds it exactly."""
    generator = torch.Generator().manual_seed(0)
    clients = torch.arange(2).repeat_interleave(200)
    places = torch.rand(400, 1, generator=generator, dtype=torch.float64)
    gains = -((places[:, 0] - torch.tensor([0.2, 0.8], dtype=torch.float64)[clients]) ** 2)
    surrogate = Surrogate(_encodings(2), (0,), ridge=1e-6)
    surrogate.fit(clients, places, gains)
    found = surrogate.best(generator=generator)
    torch.testing.assert_close(found[:, 0], torch.tensor([0.2, 0.8], dtype=torch.float64), atol=0.02, rtol=0)


def test_candidates_are_the_whole_small_grid() -> None:
    surrogate = Surrogate(_encodings(2), (2, 3))
    found = surrogate.candidates(10, torch.Generator())
    assert sorted(map(tuple, found.tolist())) == [(a, b) for a in (0.0, 1.0) for b in (0.0, 1.0, 2.0)]
    assert surrogate.candidates(5, torch.Generator()).shape == (5, 2)
    assert Surrogate(_encodings(2), (4,)).candidates(10, torch.Generator()).shape == (4, 1)


def test_normalised_gains_by_hand() -> None:
    """Client 0: gains 1, 2, 3: median 2, deviations 1, 0, 1, spread 1.4826. Client 1 is ten times larger and
    gives the same. A second part of the trajectory is a group of its own."""
    gains = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, 30.0, 7.0])
    clients = torch.tensor([0, 0, 0, 1, 1, 1, 0])
    starts = torch.tensor([0, 1, 2, 0, 1, 2, 9])
    found = normalised_gains(gains, clients, starts, 10, 2)
    expected = [-1 / 1.4826, 0, 1 / 1.4826] * 2 + [0]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)
    wild = normalised_gains(
        torch.tensor([0.0, 0.1, 0.2, -100.0]), torch.zeros(4).long(), torch.zeros(4).long(), 1, 1
    )
    assert float(wild[3]) == -3.0


def test_order_of_use() -> None:
    surrogate = Surrogate(_encodings(2), (2,))
    with pytest.raises(RuntimeError, match=r"predict\(\) comes after fit\(\); fit the surrogate"):
        surrogate.predict(torch.tensor([0]), torch.zeros(1, 1))
    with pytest.raises(ValueError, match="the log holds no trial to learn from; search for at least one"):
        surrogate.fit(torch.zeros(0), torch.zeros(0, 1), torch.zeros(0))
