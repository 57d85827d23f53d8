"""FAPM written down literally: the authors' five lines in torch, and loops over entries without any torch."""

import math

import numpy as np
import torch
from torch import Tensor


def five_lines(w_pre: Tensor, w_ft: Tensor, keep: float) -> tuple[Tensor, Tensor]:
    """The authors' script on one tensor: output and mask."""
    delta = w_ft - w_pre
    score = delta.abs() - w_pre.abs().mean() * (delta.abs() / w_pre.abs())
    chosen = torch.argsort(score.flatten(), descending=True)[: int(score.numel() * keep)]
    mask = torch.zeros(score.numel(), dtype=w_pre.dtype)
    mask[chosen] = 1
    return w_pre + mask.view_as(w_pre) * delta, mask.view_as(w_pre).bool()


def scores(w_pre: list[float], w_ft: list[float]) -> list[float]:
    """Scores entry by entry in fp32; 0/0 and x/0 are -inf."""
    mu = np.float32(math.fsum(abs(w) for w in w_pre) / len(w_pre))
    found = []
    for w, f in zip(w_pre, w_ft, strict=True):
        w, f = np.float32(w), np.float32(f)
        change = abs(np.float32(f - w))
        if mu == 0:
            found.append(float(change))
        elif w == 0:
            found.append(-math.inf)
        else:
            with np.errstate(over="ignore"):
                found.append(float(np.float32(change - np.float32(mu * np.float32(change / abs(w))))))
    return found


def chosen(score: list[float], k: int) -> set[int]:
    """Indices of the k largest; of equal ones the lowest index first."""
    return set(sorted(range(len(score)), key=lambda index: (-score[index], index))[:k])


def fapm_loops(w_pre: list[float], w_ft: list[float], keep: float) -> list[float]:
    """The pruned tensor, entry by entry."""
    kept = chosen(scores(w_pre, w_ft), int(len(w_pre) * keep))
    return [f if index in kept else w for index, (w, f) in enumerate(zip(w_pre, w_ft, strict=True))]
