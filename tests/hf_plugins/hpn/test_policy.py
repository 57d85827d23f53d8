"""Policies: what each can say, how it is drawn from, and the released one's near-uniform behaviour."""

import math

import pytest
import torch

from hf_plugins.hpn.policy import (
    Output,
    Policy,
    ReleasedGaussianPolicy,
    ReleasedPolicy,
    annealed_variance,
    clamped_gaussian,
    entropies,
    log_probabilities,
    mode,
    sample,
)

SIZES = (5, 6, 6)


def _encodings(num: int = 10, seed: int = 0) -> torch.Tensor:
    """As long and as small as the release's on CIFAR-10: 60 entries, norm near 0.016."""
    return 0.002 * torch.randn(num, 60, generator=torch.Generator().manual_seed(seed))


def _supervise(policy: torch.nn.Module, encodings: torch.Tensor, targets: torch.Tensor, steps: int) -> list:
    optimizer = torch.optim.Adam(
        [p for p in policy.parameters() if p.requires_grad], lr=1e-3, weight_decay=1e-4
    )
    for _ in range(steps):
        loss = -log_probabilities(policy(encodings), targets).sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return [
            p.gather(1, targets[:, [i]].long())[:, 0] for i, p in enumerate(policy(encodings).probabilities())
        ]


def test_ours_can_say_anything_and_the_released_one_cannot() -> None:
    """Dossier: trained towards arbitrary targets ours reaches p >= 0.9, the released net stays near 1/5."""
    torch.manual_seed(0)
    encodings = _encodings()
    targets = torch.stack([torch.randint(s, (10,)) for s in SIZES], dim=1).double()
    reached = _supervise(Policy(encodings, SIZES), encodings, targets, 250)
    assert min(float(p.min()) for p in reached) >= 0.9
    stuck = _supervise(ReleasedPolicy(encodings, SIZES), encodings, targets, 250)
    assert float(stuck[0].max()) <= 0.2013
    assert float(stuck[0].min()) >= 0.199


def test_released_network_has_the_released_size() -> None:
    """60 * 64 + 64 * 64 = 7,936 in the trunk, 64 * 17 = 1,088 in the heads, which do not train."""
    policy = ReleasedPolicy(_encodings(), SIZES)
    assert sum(p.numel() for p in policy.trunk.parameters()) == 7936
    assert sum(p.numel() for p in policy.heads.parameters()) == 1088
    assert not any(p.requires_grad for p in policy.heads.parameters())
    assert all(p.requires_grad for p in policy.trunk.parameters())
    start = policy(_encodings()).probabilities()[0].detach()
    assert 0.1995 < float(start.min()) <= float(start.max()) < 0.2005


def test_ours_starts_uniform_and_ignores_entries_without_information() -> None:
    encodings = torch.cat([_encodings(4), torch.ones(4, 1)], dim=1)
    policy = Policy(encodings, (3, 0))
    choices, place = policy(encodings).probabilities()
    torch.testing.assert_close(choices, torch.full((4, 3), 1 / 3))
    torch.testing.assert_close(place, torch.full((4, 1), 0.5))
    assert torch.isfinite(policy(encodings).heads[1]).all()


def test_probabilities_by_hand() -> None:
    """Logits ln 1, ln 3: p = 1/4, 3/4; H = ln 4 - 3/4 ln 3. Beta(2, 1): density 2x, mean 2/3, entropy
    1/2 - ln 2."""
    output = Output([torch.tensor([[0.0, math.log(3)]]), torch.tensor([[2.0, 1.0]])], (2, 0))
    actions = torch.tensor([[1.0, 0.25]], dtype=torch.float64)
    torch.testing.assert_close(
        log_probabilities(output, actions), torch.tensor([[math.log(0.75), math.log(0.5)]])
    )
    torch.testing.assert_close(
        entropies(output), torch.tensor([[math.log(4) - 0.75 * math.log(3), 0.5 - math.log(2)]])
    )
    torch.testing.assert_close(
        mode(output), torch.tensor([[1.0, 2 / 3]], dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_samples_follow_the_distribution() -> None:
    """20,000 draws: p = 3/4 within 5 sigma = 0.0153; Beta(2, 1) has mean 2/3, sigma of the mean 0.0017."""
    head, shapes = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[2.0, 1.0]])
    output = Output([head.expand(20_000, 2), shapes.expand(20_000, 2)], (2, 0))
    drawn = sample(output, generator=torch.Generator().manual_seed(0))
    assert float(drawn[:, 0].mean()) == pytest.approx(0.75, abs=0.0153)
    assert float(drawn[:, 1].mean()) == pytest.approx(2 / 3, abs=0.009)
    again = sample(output, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)


def test_a_draw_on_a_bound_has_a_finite_density() -> None:
    output = Output([torch.tensor([[2.0, 1.5]])], (0,))
    for place in (0.0, 1.0):
        assert torch.isfinite(log_probabilities(output, torch.tensor([[place]], dtype=torch.float64))).all()


def test_released_variance_and_clamping() -> None:
    """Variance 2.0 to 0.1 over half the search. At mean 0.5 and variance 2 a draw is cut with probability
    2 * Phi(-0.5 / sqrt 2) = 0.7237, at 0.1 with 0.1138."""
    assert annealed_variance(0, 100) == 2.0
    assert annealed_variance(25, 100) == pytest.approx(1.05)
    assert annealed_variance(50, 100) == pytest.approx(0.1)
    assert annealed_variance(99, 100) == pytest.approx(0.1)
    for variance, expected in ((2.0, 0.7237), (0.1, 0.1138)):
        mean = torch.full((20_000, 1), 0.5, requires_grad=True)
        drawn, logp = clamped_gaussian(mean, variance, generator=torch.Generator().manual_seed(0))
        cut = ((drawn == 0) | (drawn == 1)).double().mean()
        assert float(cut) == pytest.approx(expected, abs=0.016)
        assert logp.requires_grad
        assert not drawn.requires_grad


def test_released_continuous_policy_remembers_its_mean() -> None:
    torch.manual_seed(0)
    policy = ReleasedGaussianPolicy(_encodings(3), 2)
    mean = policy(_encodings(3))
    assert mean.shape == (3, 2)
    assert "last_mean_KP" in policy.state_dict()
    policy.remember(mean)
    torch.testing.assert_close(policy.last_mean_KP, mean.detach())
    assert not torch.equal(policy(_encodings(3)), mean)


def test_released_policy_needs_a_grid() -> None:
    with pytest.raises(ValueError, match="the released discrete policy needs a grid for every range"):
        ReleasedPolicy(_encodings(), (5, 0))
