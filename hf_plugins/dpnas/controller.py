"""The controller that proposes cells: an LSTM decides edge after edge, REINFORCE with a moving baseline
trains it.
"""

# Shapes: B proposals at once, O operations, D hidden units.

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_plugins.dpnas.genotypes import EDGES, NUM_NODES, OPERATIONS, Genotype

_HIDDEN = 100
_LAYERS = 2


class Proposal(NamedTuple):
    """What one roll-out gave."""

    genotype: Genotype
    """The cell."""
    log_prob: Tensor
    """Scalar: sum over the 15 decisions of the log-probability of what was chosen."""
    entropy: Tensor
    """Scalar: sum over the 15 decisions of the entropy of the distribution."""


class Controller(nn.Module):
    """Two LSTM layers of 100 units over embedded decisions, a linear head over ten operations.

    All weights start in U(-0.1, 0.1) with the head's bias at 0, as in the release (whose ``lstm_num_layers``
    flag is never passed on, so that two layers are what ran).

    Source: ENAS, arXiv 1802.03268; DPNAS, arXiv 2110.08557, search strategy.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        # The last row stands for "start".
        self.embedding = nn.Embedding(len(OPERATIONS) + 1, _HIDDEN)
        self.lstm = nn.ModuleList(nn.LSTMCell(_HIDDEN, _HIDDEN) for _ in range(_LAYERS))
        self.head = nn.Linear(_HIDDEN, len(OPERATIONS))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(-0.1, 0.1, generator=generator)
            self.head.bias.zero_()

    def _step(self, token: int, state: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        x_BD = self.embedding(torch.tensor([token]))
        after = []
        for cell, (hidden, memory) in zip(self.lstm, state, strict=True):
            hidden, memory = cell(x_BD, (hidden, memory))
            after.append((hidden, memory))
            x_BD = hidden
        return after

    def propose(self, generator: torch.Generator, *, uniform: bool = False) -> Proposal:
        """Decide the 15 edges of a cell.

        Args:
            generator: Source of the choices.
            uniform: Give every operation probability 1/10 and leave the network out (warm-up, random search).

        Returns:
            The cell, with the log-probability and entropy that carry gradients unless ``uniform``.
        """
        start = len(OPERATIONS)
        state = [(torch.zeros(1, _HIDDEN), torch.zeros(1, _HIDDEN)) for _ in self.lstm]
        if not uniform:
            for _ in range(2):
                state = self._step(start, state)
        chosen, log_probs, entropies = [], [], []
        token = start
        for index, (_, node) in enumerate(EDGES):
            if uniform:
                logits = torch.zeros(len(OPERATIONS))
            else:
                state = self._step(token, state)
                logits = self.head(state[-1][0])[0]
            log_p = logits.log_softmax(0)
            operation = int(torch.multinomial(log_p.detach().exp(), 1, generator=generator))
            chosen.append(operation)
            log_probs.append(log_p[operation])
            entropies.append(-(log_p.exp() * log_p).sum())
            token = operation
            last_of_node = index + 1 == len(EDGES) or EDGES[index + 1][1] != node
            if last_of_node and node < NUM_NODES:
                # A node ends: its last decision is read, then the next node begins at the start token.
                if not uniform:
                    state = self._step(token, state)
                token = start
        return Proposal(Genotype(tuple(chosen)), torch.stack(log_probs).sum(), torch.stack(entropies).sum())


class Baseline:
    """Exponential moving average of rewards, b <- 0.99 b + 0.01 R, starting from 0.

    Source: release of DPNAS, dp_search/nas_architect.py.
    """

    def __init__(self, value: float = 0.0, decay: float = 0.99) -> None:
        self.value, self.decay = value, decay

    def advantage(self, reward: float) -> float:
        """Reward minus the average of the rewards before it; then the average takes this one in."""
        before = self.value
        self.value = self.decay * before + (1 - self.decay) * reward
        return reward - before


def reinforce_loss(proposal: Proposal, advantage: float, *, entropy_weight: float = 0.005) -> Tensor:
    """REINFORCE with an entropy bonus: ``-log P * A - w * H``, a scalar with gradient to the controller.

    Args:
        proposal: A roll-out of the controller.
        advantage: Reward minus baseline, unitless.
        entropy_weight: Weight w of the entropy, 0.005 in the release.

    Source: Williams 1992; DPNAS, arXiv 2110.08557, search strategy.
    """
    return -proposal.log_prob * advantage - entropy_weight * proposal.entropy
