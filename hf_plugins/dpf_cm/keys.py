"""Keys of the vector database: pooled hidden states of prefixes, centred, without their common directions."""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Shapes: B texts, T tokens, H hidden size, K keys of a text, N keys in all, D calibration states, P bits.


def prefix_means(hidden_BTH: Tensor, mask_BT: Tensor, ends_BK: Tensor) -> Tensor:
    """Mean hidden state of the content tokens of prefixes.

    ``e_k = sum_{t < end_k} m_t h_t / sum_{t < end_k} m_t``. In a causal model the states of a prefix do not
    depend on what follows, so one forward pass over the whole text gives all of them.

    Args:
        hidden_BTH: Hidden states of one layer, any float dtype; summed in fp32.
        mask_BT: 1 where a token counts (no padding, no template token).
        ends_BK: Exclusive ends of the prefixes, in tokens.

    Returns:
        Means (B, K, H), fp32; zero for a prefix without content.
    """
    weights = mask_BT.to(hidden_BTH.device).float()
    sums = (hidden_BTH.float() * weights.unsqueeze(-1)).cumsum(1)
    counts = weights.cumsum(1)
    last = (ends_BK.to(sums.device) - 1).clamp(0, hidden_BTH.shape[1] - 1)
    empty = ends_BK.to(sums.device) <= 0
    picked = sums.gather(1, last.unsqueeze(-1).expand(-1, -1, sums.shape[-1]))
    number = counts.gather(1, last).clamp(min=1.0)
    return (picked / number.unsqueeze(-1)).masked_fill(empty.unsqueeze(-1), 0.0)


class Whitening(NamedTuple):
    """What is taken off pooled states before they are compared."""

    mean_H: Tensor
    directions_RH: Tensor
    """Orthonormal rows: the common directions."""

    def __call__(self, states_NH: Tensor) -> Tensor:
        """Unit vectors (N, H) in fp32; a state that has nothing left is the zero vector."""
        x = states_NH.float() - self.mean_H.to(states_NH.device)
        directions = self.directions_RH.to(states_NH.device)
        x = x - (x @ directions.T) @ directions
        return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def fit_whitening(states_DH: Tensor, *, num_directions: int = 3) -> Whitening:
    """Mean and leading principal directions of benign pooled states.

    Hidden spaces are narrow cones: any two texts have a high cosine until the common part is gone.

    Args:
        states_DH: Pooled states of benign prompts.
        num_directions: Principal directions to remove; capped by D - 1 and H - 1.

    Returns:
        The map.
    """
    x = states_DH.float()
    mean = x.mean(0)
    count = max(0, min(num_directions, x.shape[0] - 1, x.shape[1] - 1))
    # Full SVD of the smaller side; D is some hundreds.
    _, _, rows = torch.linalg.svd(x - mean, full_matrices=False)
    return Whitening(mean, rows[:count])


def best_match(queries_BH: Tensor, keys_NH: Tensor) -> tuple[Tensor, Tensor]:
    """Highest cosine and its key for each query; both sides are unit vectors.

    Args:
        queries_BH: Queries.
        keys_NH: Keys, any float dtype; without keys the cosine is -inf and the index -1.

    Returns:
        Cosines (B,) fp32 and indices (B,) int64.
    """
    if not len(keys_NH):
        size = len(queries_BH)
        return torch.full((size,), -math.inf), torch.full((size,), -1, dtype=torch.long)
    queries = queries_BH.to(keys_NH.device, keys_NH.dtype)
    # One prompt is a matrix-vector product: bound by memory, so half precision pays, which it does not in the
    # product with a matrix of one column.
    cosines_NB = (keys_NH @ queries[0])[:, None] if len(queries) == 1 else keys_NH @ queries.T
    cosines, indices = cosines_NB.float().max(0)
    return cosines, indices


def sign_projection(secret: bytes, width: int, num_bits: int) -> Tensor:
    """Secret matrix of +1 and -1, (num_bits, width), int8: the bits of SHAKE-256 of the secret.

    Raises:
        ValueError: If the secret is shorter than 16 bytes.
    """
    if len(secret) < 16:
        raise ValueError(
            f"the secret of a sketch needs 16 bytes or more; got {len(secret)}. Use secrets.token_bytes(32)."
        )
    label = b"mmhf.dpf_cm.sketch.v1" + width.to_bytes(4, "big") + num_bits.to_bytes(4, "big")
    stream = hashlib.shake_256(label + secret).digest((width * num_bits + 7) // 8)
    bytes_ = torch.frombuffer(bytearray(stream), dtype=torch.uint8)
    bits = (bytes_.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return (2 * bits.flatten()[: width * num_bits].to(torch.int8) - 1).view(num_bits, width)


def sketch(states_NH: Tensor, projection_PH: Tensor) -> Tensor:
    """Signs of the projections, (N, P) as +1 and -1 in fp32, scaled to unit length.

    Two states at an angle ``theta`` differ in a bit with probability ``theta / pi``; the scaled dot product
    of their sketches is ``1 - 2 h / P`` with h differing bits.
    """
    signs = torch.where(states_NH.float() @ projection_PH.to(states_NH.device).float().T >= 0, 1.0, -1.0)
    return signs / projection_PH.shape[0] ** 0.5


def sketch_cosine(dots_: Tensor) -> Tensor:
    """Cosine estimated from dot products of sketches: ``cos(pi * (1 - dot) / 2)``."""
    return torch.cos(math.pi * (1 - dots_.clamp(-1, 1)) / 2)


def angle_std(cosine: float, num_bits: int) -> float:
    """Standard deviation of an angle from b bits: ``pi sqrt(u (1 - u) / b)``, ``u = theta / pi``."""
    u = math.acos(max(-1.0, min(1.0, cosine))) / math.pi
    return math.pi * math.sqrt(u * (1 - u) / num_bits)


def prefix_ends(prompt_len: int, total_len: int, shares: Sequence[float]) -> list[int]:
    """Token ends of the prefixes at which keys are made: the prompt plus a share of the answer, 0 first.

    Args:
        prompt_len: Tokens of the prompt.
        total_len: Tokens of prompt and answer.
        shares: Shares of the answer in [0, 1].

    Returns:
        Ends, ascending, without repetitions.
    """
    answer = total_len - prompt_len
    return sorted({prompt_len + math.ceil(share * answer - 1e-9) for share in shares})
