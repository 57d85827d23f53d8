"""What a client tells about its data: one short noisy vector that no single example can move far.

Letters: N examples, D input dimensions, F features, L labels.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from hf_plugins.hpn.gaussian import gaussian_epsilon

EncoderKind = Literal["rff", "rff-median", "frozen-features", "histogram"]
# The release's settings: kernel bandwidth, and the seed that makes the encodings of all clients comparable.
RELEASED_BANDWIDTH, RELEASED_SEED = 127.0, 1234


def frequencies(dim: int, num_features: int, *, bandwidth: float, seed: int) -> Tensor:
    """Frequencies of random Fourier features, the same on every client.

    Args:
        dim: Input dimensions D.
        num_features: Features F; even, because each frequency gives a cosine and a sine.
        bandwidth: Squared kernel width: entries are drawn from N(0, 1 / bandwidth).
        seed: Seed; 1234 gives the release's numbers. Global random states are not touched.

    Returns:
        (F / 2, D), float64.

    Raises:
        ValueError: If a number is out of range.
    """
    if num_features < 2 or num_features % 2:
        raise ValueError(
            f"num_features must be even and >= 2; got {num_features}. A frequency gives a cosine and a sine."
        )
    if not (math.isfinite(bandwidth) and bandwidth > 0):
        raise ValueError(f"bandwidth must be a finite number > 0; got {bandwidth}.")
    # RandomState, not default_rng: the release draws from numpy's legacy stream.
    draws = np.random.RandomState(seed).randn(num_features // 2, dim)
    return torch.from_numpy(draws / math.sqrt(bandwidth))


def fourier_features(x_ND: Tensor, frequencies_HD: Tensor) -> Tensor:
    """Random Fourier features ``[cos(Wx), sin(Wx)] / sqrt(F / 2)``; each row has norm 1.

    ``E phi(x).phi(y) = exp(-||x - y||^2 / (2 * bandwidth))``.

    Args:
        x_ND: Inputs, flattened.
        frequencies_HD: From `frequencies`.

    Returns:
        (N, F), float64.
    """
    phase_NH = x_ND.double() @ frequencies_HD.T
    return torch.cat([phase_NH.cos(), phase_NH.sin()], dim=1) / math.sqrt(frequencies_HD.shape[0])


def mean_embedding(features_NF: Tensor, labels_N: Tensor, num_labels: int) -> Tensor:
    """Mean over examples of features x one-hot label.

    Rows of ``features_NF`` have norm <= 1, so replacing one example moves the result by at most 2 / N in
    Frobenius norm.

    Args:
        features_NF: Features with rows of norm at most 1.
        labels_N: Labels in 0..L-1.
        num_labels: L.

    Returns:
        (F, L), float64, Frobenius norm at most 1.

    Raises:
        ValueError: If there is no example or a label is out of range.

    Source: HPN, arXiv 2304.05195; DP-MERF.
    """
    check_labels(labels_N, num_labels)
    out_LF = torch.zeros(num_labels, features_NF.shape[1], dtype=torch.float64)
    out_LF.index_add_(0, labels_N.long(), features_NF.double())
    return out_LF.T / len(labels_N)


def label_histogram(labels_N: Tensor, num_labels: int) -> Tensor:
    """Share of each label; replacing one example moves it by at most sqrt(2) / N.

    Args:
        labels_N: Labels in 0..L-1.
        num_labels: L.

    Returns:
        (L,), float64, sums to 1.
    """
    check_labels(labels_N, num_labels)
    return torch.bincount(labels_N.long(), minlength=num_labels).double() / len(labels_N)


def check_labels(labels_N: Tensor, num_labels: int) -> None:
    """Refuse an empty client and labels that the encoding has no column for.

    Raises:
        ValueError: If there is no label, or one lies outside 0..num_labels-1.
    """
    if not len(labels_N):
        raise ValueError("this client has no example to encode; give it data, or leave it out of the cohort.")
    low, high = int(labels_N.min()), int(labels_N.max())
    if low < 0 or high >= num_labels:
        raise ValueError(
            f"labels must lie in 0..{num_labels - 1}; got {low}..{high}. Set num_labels to the largest "
            "number of labels of any client."
        )


def median_bandwidth(x_ND: Tensor, *, generator: torch.Generator, num_pairs: int = 2000) -> float:
    """Bandwidth at which two typical inputs have kernel value 1/e: half the median squared distance.

    The result is a function of the inputs: take public ones, or count it as a release of its own.

    Args:
        x_ND: At least two inputs, flattened.
        generator: Draws the pairs.
        num_pairs: Pairs drawn.

    Returns:
        Bandwidth for `frequencies`.

    Raises:
        ValueError: If there are fewer than two inputs, or typical inputs are equal.
    """
    if len(x_ND) < 2:
        raise ValueError(f"the median distance needs at least two inputs; got {len(x_ND)}.")
    first = torch.randint(len(x_ND), (num_pairs,), generator=generator)
    shift = torch.randint(1, len(x_ND), (num_pairs,), generator=generator)
    second = (first + shift) % len(x_ND)
    bandwidth = float((x_ND[first].double() - x_ND[second].double()).square().sum(1).median()) / 2
    if bandwidth == 0:
        raise ValueError("half of the inputs or more are equal; give bandwidth as a number.")
    return bandwidth


def projection(dim: int, num_features: int, *, seed: int = RELEASED_SEED) -> Tensor:
    """Random projection (dim, num_features) that keeps norms on average, the same on every client."""
    draws = np.random.RandomState(seed).randn(dim, num_features)
    return torch.from_numpy(draws / math.sqrt(num_features))


def projected_features(x_ND: Tensor, projection_DF: Tensor) -> Tensor:
    """Inputs scaled to norm 1, projected, and cut back to norm at most 1.

    Args:
        x_ND: Features of a public backbone.
        projection_DF: From `projection`.

    Returns:
        (N, F), float64, rows of norm at most 1 (a zero row stays zero).
    """
    unit_ND = torch.nn.functional.normalize(x_ND.double(), dim=1)
    out_NF = unit_ND @ projection_DF
    return out_NF / out_NF.norm(dim=1, keepdim=True).clamp_min(1.0)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """How a client's examples become one vector; equal on all clients, and plain numbers only.

    ``rff`` is the paper's mean embedding (its bandwidth and seed by default), ``rff-median`` the same with a
    bandwidth from `median_bandwidth`, ``frozen-features`` the mean of projected features of a public
    backbone (hand it features as inputs), ``histogram`` the shares of the labels.
    """

    kind: EncoderKind
    """One of the four."""
    num_labels: int
    """Labels L; the vector has a column for each."""
    dim: int = 0
    """Input dimensions D after flattening; not used by ``histogram``."""
    num_features: int = 6
    """Features F per label; not used by ``histogram``."""
    bandwidth: float = RELEASED_BANDWIDTH
    """Squared kernel width of the two ``rff`` kinds."""
    seed: int = RELEASED_SEED
    """Seed of frequencies and projection."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(EncoderKind):
            known = ", ".join(get_args(EncoderKind))
            raise ValueError(f"encoder must be one of {known}; got {self.kind!r}.")
        if self.num_labels < 1:
            raise ValueError(f"num_labels must be >= 1; got {self.num_labels}. Without labels, use 1.")
        if self.kind != "histogram" and self.dim < 1:
            raise ValueError(f"dim must be the number of input dimensions, >= 1; got {self.dim}.")

    @property
    def size(self) -> int:
        """Length of the vector."""
        return self.num_labels if self.kind == "histogram" else self.num_features * self.num_labels

    def sensitivity(self, num_examples: int) -> float:
        """Largest L2 change of the vector when one of ``num_examples`` is replaced."""
        return (math.sqrt(2) if self.kind == "histogram" else 2.0) / num_examples

    def mean(self, x_ND: Tensor, labels_N: Tensor) -> Tensor:
        """The vector without noise; not for leaving the client.

        Args:
            x_ND: Inputs with any further dimensions, which are flattened.
            labels_N: Labels in 0..L-1.

        Returns:
            (size,), float64.

        Raises:
            ValueError: If shapes or labels do not fit, or an input is not finite.
        """
        if self.kind == "histogram":
            return label_histogram(labels_N, self.num_labels)
        x_ND = x_ND.flatten(1)
        if x_ND.shape[1] != self.dim:
            raise ValueError(f"inputs have {x_ND.shape[1]} dimensions; the encoder was made for {self.dim}.")
        if len(x_ND) != len(labels_N):
            raise ValueError(f"inputs and labels must be as many; got {len(x_ND)} and {len(labels_N)}.")
        if not torch.isfinite(x_ND).all():
            raise ValueError("inputs hold NaN or infinity; clean the data of this client before encoding it.")
        if self.kind == "frozen-features":
            table = projection(self.dim, self.num_features, seed=self.seed)
            features_NF = projected_features(x_ND, table)
        else:
            table = frequencies(self.dim, self.num_features, bandwidth=self.bandwidth, seed=self.seed)
            features_NF = fourier_features(x_ND, table)
        return mean_embedding(features_NF, labels_N, self.num_labels).flatten()


@dataclass(frozen=True, kw_only=True)
class ClientEncoding:
    """What leaves the client."""

    vector: Tensor
    """(size,), float64."""
    num_examples: int
    """Examples behind it; public."""
    noise_multiplier: float
    """Noise standard deviation over the sensitivity."""

    def epsilon(self, delta: float) -> float:
        """Epsilon of this one release under replacing an example; infinity without noise."""
        return gaussian_epsilon(self.noise_multiplier, delta=delta)


def encode(
    x_ND: Tensor,
    labels_N: Tensor,
    encoder: Encoder,
    *,
    noise_multiplier: float,
    generator: torch.Generator,
) -> ClientEncoding:
    """Encode a client's examples and add calibrated Gaussian noise.

    ``e = mean(phi(x) x onehot(y)) + N(0, (noise_multiplier * sensitivity)^2)``.

    Args:
        x_ND: Inputs.
        labels_N: Labels.
        encoder: Shared by all clients.
        noise_multiplier: Noise over sensitivity; 0.1 in the release (epsilon 92 at delta 1e-5), 0 for none.
        generator: Source of the noise; must be secret if the noise shall protect.

    Returns:
        The noisy vector with what it costs.

    Raises:
        ValueError: If the multiplier is negative or not finite.

    Source: HPN, section on client encoding; ``noise_factor`` of the release is ``noise_multiplier``.
    """
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise ValueError(f"noise_multiplier must be a finite number >= 0; got {noise_multiplier}.")
    vector = encoder.mean(x_ND, labels_N)
    scale = noise_multiplier * encoder.sensitivity(len(labels_N))
    noise = torch.randn(vector.shape, generator=generator, dtype=torch.float64)
    return ClientEncoding(
        vector=vector + scale * noise, num_examples=len(labels_N), noise_multiplier=noise_multiplier
    )
