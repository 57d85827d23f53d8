"""Rewards, losses, baselines and starts, by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_plugins.hpn.rewards import (
    BucketBaseline,
    draw_start,
    linear_schedule,
    reinforce_loss,
    released_loss,
    released_reward,
)


@given(st.floats(0, 1), st.floats(0, 1))
def test_released_reward(end: float, anchor: float) -> None:
    expected = (end - anchor) * anchor if end > anchor else 0.0
    assert released_reward(end, anchor) == pytest.approx(expected, abs=1e-12)
    assert released_reward(end, anchor, weighted=False) == pytest.approx(max(0.0, end - anchor), abs=1e-12)


def test_released_loss_by_hand() -> None:
    """Two clients, two parameters: mean logp -1.5 and -3; 100 * 0.2 * their mean 2.25 = 45."""
    logp = torch.tensor([[-1.0, -2.0], [-4.0, -2.0]])
    assert float(released_loss(0.2, logp)) == pytest.approx(45.0)
    assert float(released_loss(0.2, logp, discrete=False)) == pytest.approx(0.45)
    # A density above 1: the discrete form cuts it away, the continuous one does not.
    assert float(released_loss(0.2, -logp)) == 0.0
    assert float(released_loss(0.2, -logp, discrete=False)) == pytest.approx(-0.45)
    assert float(released_loss(0.0, logp)) == 0.0


def test_reinforce_loss_by_hand() -> None:
    """Advantages 2, -1; sums of logp -3, -6 (second client's second parameter idle: -4); entropies 1 each.
    -mean(2 * -3 + 0.1 * 2, -1 * -4 + 0.1 * 1) = -(-5.8 + 4.1) / 2 = 0.85."""
    logp = torch.tensor([[-1.0, -2.0], [-4.0, -2.0]], requires_grad=True)
    loss = reinforce_loss(
        torch.tensor([2.0, -1.0]),
        logp,
        torch.ones(2, 2),
        torch.tensor([[True, True], [True, False]]),
        entropy_weight=0.1,
    )
    assert float(loss.detach()) == pytest.approx(0.85)
    loss.backward()
    # d loss / d logp = -advantage / K, 0 where idle.
    torch.testing.assert_close(logp.grad, torch.tensor([[-1.0, -1.0], [0.5, 0.0]]))


def test_reinforce_divides_by_participants() -> None:
    one = reinforce_loss(
        torch.ones(1), torch.full((1, 2), -1.0), torch.zeros(1, 2), torch.ones(1, 2), entropy_weight=0.0
    )
    four = reinforce_loss(
        torch.ones(4), torch.full((4, 2), -1.0), torch.zeros(4, 2), torch.ones(4, 2), entropy_weight=0.0
    )
    assert float(one) == float(four) == 2.0


def test_reinforce_gradient_is_unbiased() -> None:
    """Two arms with rewards 1 and 0 and p = (1/4, 3/4): d E[r] / d logit_1 = p1 * p2 = 3/16. The mean of the
    estimates over both arms, weighted by their probabilities, equals it exactly."""
    logits = torch.tensor([0.0, math.log(3)], dtype=torch.float64, requires_grad=True)
    total = torch.zeros(2, dtype=torch.float64)
    for arm, (p, reward) in enumerate(((0.25, 1.0), (0.75, 0.0))):
        logp = logits.log_softmax(0)[arm].view(1, 1)
        loss = reinforce_loss(
            torch.tensor([reward - 0.4]), logp, torch.zeros(1, 1), torch.ones(1, 1), entropy_weight=0.0
        )
        total += p * torch.autograd.grad(-loss, logits)[0]
    torch.testing.assert_close(total, torch.tensor([3 / 16, -3 / 16], dtype=torch.float64), atol=1e-7, rtol=0)


def test_starts_are_uniform() -> None:
    """Chi-square over 20 starts and 20,000 draws: 19 degrees of freedom, 1e-6 quantile 63.2."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(20)
    for _ in range(20_000):
        counts[draw_start(list(range(20)), generator=generator)] += 1
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 63.2
    assert counts[0] > 0
    assert counts[19] > 0


def test_released_starts_never_hold_round_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    assert {draw_start([0, 1, 2], generator=generator, released=True) for _ in range(200)} == {1, 2}
    with pytest.raises(ValueError, match="no anchor to start from; run the anchor phase"):
        draw_start([0], generator=generator, released=True)


def test_schedule() -> None:
    assert [linear_schedule(1.0, 0.0, step, 5) for step in (0, 2, 4, 9)] == [1.0, 0.5, 0.0, 0.0]
    assert linear_schedule(1.0, 0.0, 0, 1) == 1.0


def test_baseline_by_hand() -> None:
    """Rewards 1, 3: mean 2; deviations |1 - 1| = 0, then |3 - 2| = 1 at weight 1: spread 1.2533.
    The third reward 4.5066 is (4.5066 - 2) / 1.2533 = 2 spreads above."""
    baseline = BucketBaseline(10, 2)
    assert baseline.advantage(0, {"a": 1.0}) == {"a": 0.0}
    baseline.update(0, {"a": 1.0})
    assert baseline.advantage(4, {"a": 3.0}) == {"a": 0.0}
    baseline.update(4, {"a": 3.0})
    found = baseline.advantage(2, {"a": 4.5066, "b": 1.0})
    assert found["a"] == pytest.approx(2.0, abs=1e-4)
    assert found["b"] == 0.0  # a client of its own
    assert baseline.advantage(5, {"a": 100.0}) == {"a": 0.0}  # a part of its own
    assert baseline.advantage(0, {"a": -1e9}) == {"a": -3.0}
    other = BucketBaseline(10, 2)
    other.load_state_dict(baseline.state_dict())
    assert other.advantage(2, {"a": 4.0}) == baseline.advantage(2, {"a": 4.0})


def test_baseline_follows_a_moving_mean() -> None:
    """After 200 rewards of 0 and 40 of 1 the mean has forgotten 1 - 0.9^40 = 98.5 %."""
    baseline = BucketBaseline(1, 5)
    for reward in [0.0] * 200 + [1.0] * 40:
        baseline.update(0, {"a": reward})
    assert baseline.state_dict()["moments"]["0/a"][0] == pytest.approx(1 - 0.9**40, abs=1e-6)
