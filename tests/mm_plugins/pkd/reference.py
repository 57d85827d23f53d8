"""The loss of PKD written down literally: loops over channels, float64, no tricks; and the authors' tensor
form."""

import math

import torch.nn.functional as F
from torch import Tensor


def standardise(values: list[float], eps: float) -> list[float]:
    """(x - mean) / (sd + eps) with the unbiased sd, one channel as a plain list."""
    mean = math.fsum(values) / len(values)
    sd = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1))
    return [(x - mean) / (sd + eps) for x in values]


def pkd_loops(student: Tensor, teacher: Tensor, eps: float = 1e-6) -> float:
    """Half the mean square difference of the standardised channels, channel by channel."""
    total = 0.0
    for c in range(student.shape[1]):
        s_hat = standardise(student[:, c].flatten().tolist(), eps)
        t_hat = standardise(teacher[:, c].flatten().tolist(), eps)
        total += math.fsum((a - b) ** 2 for a, b in zip(s_hat, t_hat, strict=True))
    return total / student.numel() / 2


def correlation_loops(student: Tensor, teacher: Tensor) -> list[float]:
    """Pearson's r of each channel over all images and positions."""
    out = []
    for c in range(student.shape[1]):
        s, t = student[:, c].flatten().tolist(), teacher[:, c].flatten().tolist()
        ms, mt = math.fsum(s) / len(s), math.fsum(t) / len(t)
        product = math.fsum((a - ms) * (b - mt) for a, b in zip(s, t, strict=True))
        squares = math.fsum((a - ms) ** 2 for a in s) * math.fsum((b - mt) ** 2 for b in t)
        out.append(product / math.sqrt(squares))
    return out


def pkd_tensors(student: Tensor, teacher: Tensor, eps: float = 1e-6) -> Tensor:
    """The form of the authors' release, left to autograd: resize, standardise per channel, mse / 2."""
    if student.shape[2:] != teacher.shape[2:]:
        student = F.interpolate(student, teacher.shape[2:], mode="bilinear", align_corners=False)
    normal = []
    for x in (student, teacher.detach()):
        flat = x.permute(1, 0, 2, 3).reshape(x.shape[1], -1)
        normal.append((flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + eps))
    return F.mse_loss(*normal) / 2
