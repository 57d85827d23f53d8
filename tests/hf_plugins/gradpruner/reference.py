"""The paper's formulas, literally: dense products, loops, float64."""

import torch
from torch import Tensor


def layer_importance(grad_a: list[Tensor], grad_b: list[Tensor]) -> float:
    """One module's share of a layer's score: sum over elements of the mean over steps of (g_B g_A)^2."""
    total = torch.zeros(grad_b[0].shape[0], grad_a[0].shape[1], dtype=torch.float64)
    for a, b in zip(grad_a, grad_b, strict=True):
        total += (b.double() @ a.double()) ** 2
    return float((total / len(grad_a)).sum())


def importance_matrix(grad_a: list[Tensor], grad_b: list[Tensor]) -> Tensor:
    """F of one module, element by element."""
    total = torch.zeros(grad_b[0].shape[0], grad_a[0].shape[1], dtype=torch.float64)
    for a, b in zip(grad_a, grad_b, strict=True):
        for i in range(total.shape[0]):
            for j in range(total.shape[1]):
                total[i, j] += sum(float(b[i, r]) * float(a[r, j]) for r in range(a.shape[0])) ** 2
    return total / len(grad_a)


def donor_mask(importance: Tensor, keep: float) -> Tensor:
    """The int(keep * numel) largest entries; of equal ones the first in row-major order."""
    order = sorted(range(importance.numel()), key=lambda i: (-float(importance.flatten()[i]), i))
    mask = torch.zeros(importance.numel(), dtype=torch.bool)
    for index in order[: int(keep * importance.numel())]:
        mask[index] = True
    return mask.view(importance.shape)


def merge(receiver: Tensor, donors: list[Tensor], masks: list[Tensor]) -> Tensor:
    """R + sum of masked donor entries with R * D > 0, signs against the R from before."""
    result = receiver.double().clone()
    for donor, mask in zip(donors, masks, strict=True):
        for i in range(receiver.shape[0]):
            for j in range(receiver.shape[1]):
                if mask[i, j] and float(receiver[i, j]) * float(donor[i, j]) > 0:
                    result[i, j] += float(donor[i, j])
    return result
