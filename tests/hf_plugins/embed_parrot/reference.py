"""The attacks, losses and measures written down literally: loops, float64, no tricks."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two vectors, entry by entry."""
    dot = math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    na, nb = (math.sqrt(math.fsum(float(x) ** 2 for x in v)) for v in (a, b))
    return dot / (na * nb)


def hei(hidden: Tensor, codebook: Tensor) -> list[int]:
    """For each state the first row with the largest cosine."""
    found = []
    for h in hidden.double():
        scores = [cosine(h, e) for e in codebook.double()]
        found.append(scores.index(max(scores)))
    return found


def bei(hidden: Tensor, head: Tensor, bias: Tensor | None = None) -> list[int]:
    """For each state the first token with the largest softmax share."""
    found = []
    for h in hidden.double():
        logits = [math.fsum((float(a) * float(b) for a, b in zip(h, w, strict=True))) for w in head.double()]
        if bias is not None:
            logits = [x + float(b) for x, b in zip(logits, bias, strict=True)]
        top = max(logits)
        total = math.fsum(math.exp(x - top) for x in logits)
        shares = [math.exp(x - top) / total for x in logits]
        found.append(shares.index(max(shares)))
    return found


def ridge(hidden: Tensor, target: Tensor, penalty: float) -> Tensor:
    """``(X^T X + lambda m I)^-1 X^T Y`` with a column of ones in X and m the mean diagonal of ``X^T X``."""
    x = torch.cat([hidden.double(), torch.ones(len(hidden), 1, dtype=torch.float64)], 1)
    gram = x.T @ x
    eye = torch.eye(len(gram), dtype=torch.float64)
    return torch.linalg.inv(gram + penalty * gram.diagonal().mean() * eye) @ x.T @ target.double()


def cosine_loss(output: Tensor, target: Tensor) -> float:
    """Mean of 1 - cosine."""
    return math.fsum(1 - cosine(a, b) for a, b in zip(output, target, strict=True)) / len(output)


def cosine_cross_entropy(output: Tensor, codebook: Tensor, labels: Sequence[int], tau: float) -> Tensor:
    """Mean cross entropy over ``tau * cos``, with gradients by autograd, one token at a time."""
    total = output.new_zeros(())
    unit = codebook / codebook.norm(dim=1, keepdim=True)
    for row, label in zip(output, labels, strict=True):
        logits = tau * (unit @ (row / row.norm()))
        total = total - logits[label] + torch.logsumexp(logits, 0)
    return total / len(output)


def dct(values: Sequence[float]) -> list[float]:
    """Orthonormal DCT-II of one vector."""
    d = len(values)
    found = []
    for k in range(d):
        scale = math.sqrt((1 if k == 0 else 2) / d)
        found.append(
            scale * math.fsum(x * math.cos(math.pi / d * (n + 0.5) * k) for n, x in enumerate(values))
        )
    return found


def inverse_dct(values: Sequence[float]) -> list[float]:
    """Inverse of `dct`."""
    d = len(values)
    return [
        math.fsum(
            math.sqrt((1 if k == 0 else 2) / d) * x * math.cos(math.pi / d * (n + 0.5) * k)
            for k, x in enumerate(values)
        )
        for n in range(d)
    ]


def window_average(values: Sequence[float], window: int) -> list[float]:
    """``s -> s P`` with ``P[i, i..i+w-1] = 1/w``: each entry is handed on in equal parts to its window."""
    d = len(values)
    found = [0.0] * d
    for i, x in enumerate(values):
        inside = range(i, min(i + window, d))
        for j in inside:
            found[j] += x / len(inside)
    return found


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, by the full table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@torch.no_grad()
def match_whole_sequences(model: torch.nn.Module, observed: Tensor, layer: int, vocab_size: int) -> list[int]:
    """Vocabulary matching as public code does it: the whole sequence again for every candidate."""
    found: list[int] = []
    for t in range(len(observed)):
        distances = []
        for candidate in range(vocab_size):
            ids = torch.tensor([[*found, candidate]])
            states = model(input_ids=ids, output_hidden_states=True).hidden_states[layer]
            distances.append(float((states[0, t] - observed[t]).norm()))
        found.append(distances.index(min(distances)))
    return found
