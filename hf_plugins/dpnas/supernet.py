"""All cells of the space in one set of weights: a path is a stand-alone network that borrows its parameters
here.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_plugins.dpnas.genotypes import EDGES, OPERATIONS, Genotype
from hf_plugins.dpnas.network import DPNASNet, has_weights, initialise_


class Supernet(nn.Module):
    """Weights of every operation on every edge of every cell, plus stem, adapter and classifier once.

    A cell with convolution o on edge e reads the weight of (cell, e, o); convolutions of different
    activations do not share, as in the release.

    Args:
        generator: Source of the initial weights.
        shape: Keyword arguments of `DPNASNet` but the genotype.
    """

    def __init__(self, generator: torch.Generator | None = None, **shape: Any) -> None:
        super().__init__()
        self.shape = shape
        # One network per convolution, each with that operation on all edges, holds all weights between them.
        self.weights = nn.ParameterDict()
        for operation in filter(has_weights, range(len(OPERATIONS))):
            whole = self._fresh(Genotype((operation,) * len(EDGES)), generator)
            for name, parameter in whole.named_parameters():
                key = self._key(name, operation)
                if key not in self.weights:
                    self.weights[key] = nn.Parameter(parameter.detach().clone())

    def _fresh(self, genotype: Genotype, generator: torch.Generator | None) -> DPNASNet:
        # Linear layers draw from the global source; it is seeded for a moment, so that a seed gives one
        # supernet.
        with torch.random.fork_rng(devices=[]):
            if generator is not None:
                torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            net = DPNASNet(genotype, **self.shape)
        initialise_(net, generator)
        return net

    @staticmethod
    def _key(name: str, operation: int) -> str:
        flat = name.replace(".", "/")
        return f"{flat}@{operation}" if "/edges/" in flat else flat

    def network(self, genotype: Genotype) -> DPNASNet:
        """A network of one cell whose parameters are this object's own: training it trains them.

        Parameters of operations outside the path are not part of it, so they get no gradient, no noise, no
        momentum.
        """
        with torch.device("meta"):
            net = DPNASNet(genotype, **self.shape)
        chosen = dict(zip((f"{f}_{t}" for f, t in EDGES), genotype.operations, strict=True))
        for name, _ in list(net.named_parameters()):
            parts = name.split(".")
            operation = chosen[parts[3]] if "edges" in parts else -1
            owner = net.get_submodule(".".join(parts[:-1]))
            setattr(owner, parts[-1], self.weights[self._key(name, operation)])
        return net


def forget_inactive_(optimizer: torch.optim.Optimizer, active: Sequence[Tensor]) -> None:
    """Drop the momentum of every parameter outside the path just trained.

    Without this a weight that is sampled again after many steps would be moved by a direction measured long
    ago.
    """
    keep = {id(parameter) for parameter in active}
    for parameter in list(optimizer.state):
        if id(parameter) not in keep:
            del optimizer.state[parameter]
