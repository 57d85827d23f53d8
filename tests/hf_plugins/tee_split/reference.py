"""Slow, literal forms: head ranking by loops, dense row-sparse forward, fixed-point products with Python
integers, padding by lists."""

from collections.abc import Sequence

from torch import Tensor


def rank_heads(weight: Tensor, heads: Sequence[Sequence[int]], count: int, *, largest: bool) -> list[int]:
    """Rows of the ``count`` heads with the largest or smallest sum of absolute weights; first heads win
    ties."""
    scores = [
        sum(abs(float(weight[row, i])) for row in rows for i in range(weight.shape[1])) for rows in heads
    ]
    order = sorted(range(len(heads)), key=lambda h: (-scores[h] if largest else scores[h], h))
    return sorted(row for head in order[:count] for row in heads[head])


def spf_dense(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Sequence[int], delta: Tensor) -> Tensor:
    """The row-sparse layer as a dense one: add the difference to the weight, row by row."""
    whole = weight.clone()
    for number, row in enumerate(rows):
        whole[row] = whole[row] + delta[number]
    out = x @ whole.T
    return out if bias is None else out + bias


def integer_product(x: Sequence[Sequence[int]], w: Sequence[Sequence[int]], modulus: int) -> list[list[int]]:
    """``x @ w.T`` modulo ``modulus`` with Python's unbounded integers."""
    return [[sum(int(a) * int(b) for a, b in zip(row, col, strict=True)) % modulus for col in w] for row in x]


def pad_rows(labels: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Labels padded on the right with -100, and the mask."""
    longest = max(len(row) for row in labels)
    padded = [list(row) + [-100] * (longest - len(row)) for row in labels]
    return padded, [[1] * len(row) + [0] * (longest - len(row)) for row in labels]


def nonce(direction: int, epoch: int, counter: int) -> bytes:
    """1 byte direction, 3 bytes epoch, 8 bytes counter."""
    return bytes([direction]) + epoch.to_bytes(3, "big") + counter.to_bytes(8, "big")
