"""Shared weights: a path borrows, the others stay as they are, bit for bit."""

import torch

from hf_plugins.dpnas.config import SHAPES
from hf_plugins.dpnas.genotypes import RELEASED, Genotype, random_genotype
from hf_plugins.dpnas.network import DPNASNet
from hf_plugins.dpnas.supernet import Supernet, forget_inactive_

SHAPE = {**SHAPES["mnist"], "image_size": 8, "stem_channels": 8, "cell_channels": (8, 8, 8), "groups": 4}


def supernet() -> Supernet:
    return Supernet(torch.Generator().manual_seed(0), **SHAPE)


def test_a_path_is_a_network_of_its_own() -> None:
    shared = supernet()
    cell = RELEASED["cifar10"]
    path = shared.network(cell)
    alone = DPNASNet(cell, **SHAPE)
    alone.load_state_dict(path.state_dict())
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(path(x), alone(x), atol=0, rtol=0)
    path.stem[0].weight.data.add_(1)
    torch.testing.assert_close(shared.network(cell).stem[0].weight, alone.stem[0].weight + 1)


def test_number_of_weights_counts_every_convolution_of_every_edge() -> None:
    """Six convolutions of 9 x 8 weights on 15 edges of three cells come on top of what all paths share."""
    bare = DPNASNet(Genotype((3,) * 15), **SHAPE)
    rest = sum(p.numel() for p in bare.parameters())
    assert sum(p.numel() for p in supernet().parameters()) == rest + 6 * 15 * 3 * 9 * 8


def test_activations_do_not_share_their_convolution() -> None:
    shared = supernet()
    relu, tanh = shared.network(Genotype((4,) * 15)), shared.network(Genotype((6,) * 15))
    assert not torch.equal(relu.cells[0].edges["0_1"][0].weight, tanh.cells[0].edges["0_1"][0].weight)


def test_a_step_moves_the_path_and_nothing_else() -> None:
    shared = supernet()
    optimizer = torch.optim.SGD(shared.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        before = {name: p.detach().clone() for name, p in shared.named_parameters()}
        path = shared.network(random_genotype(generator))
        active = {id(p) for p in path.parameters()}
        optimizer.zero_grad(set_to_none=True)
        path(torch.randn(4, 1, 8, 8, generator=generator)).square().sum().backward()
        optimizer.step()
        forget_inactive_(optimizer, list(path.parameters()))
        for name, parameter in shared.named_parameters():
            moved = not torch.equal(before[name], parameter)
            assert moved == (id(parameter) in active), name
        assert {id(p) for p in optimizer.state} == active
