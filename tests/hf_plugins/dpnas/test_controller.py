"""The controller: closed values of the uniform phase, the exact baseline, and that rewards move it."""

import math

import pytest
import torch

from hf_plugins.dpnas.controller import Baseline, Controller, reinforce_loss


def test_uniform_proposals_have_the_closed_log_probability() -> None:
    """15 decisions among ten: log-probability 15 ln(1/10) = -34.5388, entropy 15 ln 10 = 34.5388."""
    proposal = Controller().propose(torch.Generator().manual_seed(0), uniform=True)
    assert proposal.log_prob.item() == pytest.approx(-15 * math.log(10), abs=1e-4)
    assert proposal.entropy.item() == pytest.approx(34.5388, abs=1e-4)


def test_weights_start_in_the_stated_interval() -> None:
    controller = Controller(torch.Generator().manual_seed(0))
    assert not controller.head.bias.any()
    assert all(p.abs().max() <= 0.1 for p in controller.parameters())
    # 400 x 100 draws: the largest comes within 1 % of the bound.
    assert controller.lstm[0].weight_hh.abs().max() > 0.099
    assert len(controller.lstm) == 2
    assert controller.embedding.weight.shape == (11, 100)


def test_log_probability_is_that_of_the_cell_drawn() -> None:
    """With the head's weight at 0 and its bias b every decision has softmax(b); the sum is over what was
    chosen.
    """
    controller = Controller()
    with torch.no_grad():
        controller.head.weight.zero_()
        controller.head.bias.copy_(torch.arange(10.0))
    proposal = controller.propose(torch.Generator().manual_seed(1))
    log_p = torch.arange(10.0).log_softmax(0)
    chosen = sum(log_p[op].item() for op in proposal.genotype.operations)
    assert proposal.log_prob.item() == pytest.approx(chosen)
    assert proposal.entropy.item() == pytest.approx(-15 * (log_p.exp() * log_p).sum().item(), rel=1e-5)


def test_baseline_by_hand() -> None:
    """b: 0 -> .01 * .5 = .005 -> .99 * .005 + .01 * .7 = .01195; advantages .5, .7 - .005 = .695, .2 -
    .01195.
    """
    baseline = Baseline()
    assert baseline.advantage(0.5) == 0.5
    assert baseline.value == pytest.approx(0.005)
    assert baseline.advantage(0.7) == pytest.approx(0.695)
    assert baseline.value == pytest.approx(0.01195)
    assert baseline.advantage(0.2) == pytest.approx(0.18805)


def test_loss_by_hand() -> None:
    proposal = Controller().propose(torch.Generator().manual_seed(0), uniform=True)
    expected = 15 * math.log(10) * 0.25 - 0.005 * 15 * math.log(10)
    assert reinforce_loss(proposal, 0.25).item() == pytest.approx(expected, rel=1e-5)


def test_rewarded_operation_wins() -> None:
    """Reward 1 iff edge 0 is operation 5: its probability must pass 0.9."""
    torch.manual_seed(0)
    controller, baseline = Controller(torch.Generator().manual_seed(0)), Baseline()
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(controller.parameters(), lr=3e-3, betas=(0.5, 0.999))
    for _ in range(400):
        proposal = controller.propose(generator)
        advantage = baseline.advantage(float(proposal.genotype.operations[0] == 5))
        optimizer.zero_grad()
        reinforce_loss(proposal, advantage).backward()
        optimizer.step()
    with torch.no_grad():
        drawn = [controller.propose(generator).genotype.operations[0] for _ in range(100)]
    assert drawn.count(5) > 90
