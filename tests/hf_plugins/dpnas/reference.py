"""DP-SGD and the cell, written out literally: loops over samples, edges and parameters."""

import torch
from torch import Tensor, nn

from hf_plugins.dpnas.genotypes import Genotype
from hf_plugins.dpnas.network import Cell


def clipped_sum(
    network: nn.Module, images: Tensor, labels: Tensor, max_grad_norm: float
) -> dict[str, Tensor]:
    """One backward pass a sample; its whole gradient is one vector that is scaled to the bound."""
    names = [name for name, _ in network.named_parameters()]
    total = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for image, label in zip(images, labels, strict=True):
        loss = nn.functional.cross_entropy(network(image[None]), label[None])
        grads = torch.autograd.grad(loss, list(network.parameters()))
        norm = sum(g.double().square().sum().item() for g in grads) ** 0.5
        for name, g in zip(names, grads, strict=True):
            total[name] += g * min(1.0, max_grad_norm / norm)
    return total


def cell_output(cell: Cell, genotype: Genotype, x: Tensor) -> Tensor:
    """Node t is the sum over earlier nodes f of operation (f, t) of node f, zero times x for "none"."""
    nodes = {0: cell.preprocess(x)}
    for operation, f, t in genotype.triples():
        y = nodes[f] * 0 if operation == 0 else cell.edges[f"{f}_{t}"](nodes[f])
        nodes[t] = nodes[t] + y if t in nodes else y
    return torch.cat([nodes[t] for t in range(1, 6)], dim=1)
