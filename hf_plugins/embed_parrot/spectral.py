"""Discrete cosine transform and overlap matrices: our reconstruction of the paper's defence."""

# Shapes: D width of an embedding; matrices are D x D, float64.
import math

import torch
from torch import Tensor


def dct_matrix(dim: int) -> Tensor:
    """Orthonormal DCT-II, ``D[0, n] = sqrt(1/d)``, ``D[k, n] = sqrt(2/d) cos(pi/d (n + 1/2) k)``.

    Args:
        dim: Number of coefficients d, >= 1.

    Returns:
        (d, d) float64 with ``D D^T = I``.
    """
    # float64: in fp32 the angles alone cost 3e-5 at d = 1024.
    n = torch.arange(dim, dtype=torch.float64)
    matrix = math.sqrt(2 / dim) * torch.cos(math.pi / dim * (n + 0.5) * n[:, None])
    matrix[0] = math.sqrt(1 / dim)
    return matrix


def band_overlap(dim: int, keep: int) -> Tensor:
    """Keeps the ``keep`` lowest frequencies and drops the rest.

    Args:
        dim: Number of frequencies.
        keep: How many stay, 1 .. dim.

    Returns:
        (dim, dim) float64.

    Raises:
        ValueError: If ``keep`` is out of range.
    """
    if not 1 <= keep <= dim:
        raise ValueError(f"keep must lie in 1 .. {dim} (frequencies of this width); got {keep}.")
    return torch.diag((torch.arange(dim) < keep).double())


def window_overlap(dim: int, window: int) -> Tensor:
    """Spreads each frequency evenly over itself and the ``window - 1`` that follow, fewer at the end.

    Args:
        dim: Number of frequencies.
        window: Width w >= 1; 1 changes nothing.

    Returns:
        (dim, dim) float64 whose rows sum to 1.

    Raises:
        ValueError: If ``window`` is out of range.
    """
    if not 1 <= window <= dim:
        raise ValueError(f"window must lie in 1 .. {dim} (frequencies of this width); got {window}.")
    offset = torch.arange(dim) - torch.arange(dim)[:, None]
    inside = ((offset >= 0) & (offset < window)).double()
    return inside / inside.sum(1, keepdim=True)


def keyed_overlap(dim: int, window: int, *, key: int) -> Tensor:
    """Permutes the frequencies and flips their signs inside each window, by a secret number.

    Args:
        dim: Number of frequencies.
        window: Width of the windows; frequencies never leave theirs.
        key: The secret.

    Returns:
        (dim, dim) float64, orthogonal.

    Raises:
        ValueError: If ``window`` is out of range.
    """
    window_overlap(dim, window)
    generator = torch.Generator().manual_seed(key)
    order = torch.cat(
        [
            start + torch.randperm(min(window, dim - start), generator=generator)
            for start in range(0, dim, window)
        ]
    )
    signs = torch.randint(0, 2, (dim,), generator=generator).double() * 2 - 1
    return torch.eye(dim, dtype=torch.float64)[order] * signs[:, None]


def spectral_filter(overlap_DD: Tensor) -> Tensor:
    """``M = D^T P D``, so that a row ``e`` becomes ``e D^T P D``: transform, overlap, transform back.

    Args:
        overlap_DD: P (D, D); the identity gives the identity.

    Returns:
        (D, D) float64.

    Source: reconstruction of the defence of arXiv 2405.11916, whose exact form is not public.
    """
    transform_DD = dct_matrix(len(overlap_DD))
    return transform_DD.T @ overlap_DD.double() @ transform_DD
