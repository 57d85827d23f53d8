"""Defences on embeddings or at the cut, each with what an attacker who knows of it can still use."""

# Shapes: ... any leading axes, D width, V vocabulary.
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hf_plugins.embed_parrot.spectral import band_overlap, keyed_overlap, spectral_filter, window_overlap

Site = Literal["embedding", "cut"]
"""``embedding``: on the output of the embedding table; ``cut``: on the hidden states that leave the
client.
"""


def _same(x: Tensor) -> Tensor:
    return x


def sorted_entries(x_TD: Tensor) -> Tensor:
    """Entries of each vector in rising order: what no permutation of them can hide."""
    return x_TD.sort(dim=-1).values


@dataclass(frozen=True, kw_only=True)
class AdaptiveView:
    """What a realistic attacker knows of a defence."""

    codebook: Callable[[Tensor], Tensor] = _same
    """Turns the embedding table (V, D) into the one that the defended model really uses."""
    canonical: Callable[[Tensor], Tensor] = _same
    """Maps vectors to what the defence leaves unchanged; applied to both sides of a comparison."""
    knows: str
    """The assumption in words, for the report."""


@dataclass(frozen=True, kw_only=True)
class Defence:
    """Base of all defences: a map of vectors, and where it sits."""

    deterministic: ClassVar[bool] = True
    """Whether equal inputs give equal outputs; if so, whoever knows the map can repeat it."""

    site: Site = "cut"

    def __post_init__(self) -> None:
        if self.site not in ("embedding", "cut"):
            raise ValueError(f"site must be 'embedding' or 'cut'; got {self.site!r}.")

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The defended vectors, same shape and dtype as ``x`` (..., D)."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it changes vectors")

    def adaptive_view(self) -> AdaptiveView:
        """What an attacker who knows of the defence can use."""
        return AdaptiveView(knows="how the defence works and its settings, not its random draws")

    def at_scale(self, std: float) -> "Defence":
        """The same defence with its strength in units of ``std``, the spread of one entry at the cut."""
        return self

    def noise_length(self, dim: int) -> float:
        """Mean length of the noise on a vector of ``dim`` entries; an attacker knows what to expect."""
        return 0.0


@dataclass(frozen=True, kw_only=True)
class NoDefence(Defence):
    """Leaves everything as it is."""

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The same tensor."""
        return x

    def adaptive_view(self) -> AdaptiveView:
        """Nothing to adapt to."""
        return AdaptiveView(knows="the model and public text")


@dataclass(frozen=True, kw_only=True)
class DctOverlap(Defence):
    """Transforms input embeddings by DCT, an overlap matrix, and the inverse DCT.

    One of ``keep`` (keep the lowest frequencies) and ``window`` (spread each frequency over a window) is
    set; with ``key``, frequencies are permuted and signed inside the windows instead of averaged.

    Source: reconstruction of the defence of arXiv 2405.11916; its exact matrix is not public.
    """

    site: Site = "embedding"
    keep: int = 0
    window: int = 0
    key: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.keep > 0) == (self.window > 0):
            raise ValueError(
                f"give either keep or window, a positive number; got keep={self.keep}, window={self.window}. "
                "For example dct:keep=64 or dct:window=8."
            )
        if self.key is not None and not self.window:
            raise ValueError("key permutes frequencies inside windows; give window as well, or drop key.")

    def overlap(self, dim: int) -> Tensor:
        """The overlap matrix P (D, D), float64."""
        if self.keep:
            return band_overlap(dim, self.keep)
        if self.key is not None:
            return keyed_overlap(dim, self.window, key=self.key)
        return window_overlap(dim, self.window)

    def transform(self, x: Tensor) -> Tensor:
        """``x D^T P D`` over the last axis."""
        matrix = spectral_filter(self.overlap(x.shape[-1])).to(x.device)
        # The product runs in float64 only where that is cheap; a 4096-wide table would need a minute.
        dtype = torch.float64 if x.shape[-1] <= 1024 else torch.float32
        return (x.to(dtype) @ matrix.to(dtype)).to(x.dtype)

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Transformed embeddings (..., D)."""
        return self.transform(x)

    def adaptive_view(self) -> AdaptiveView:
        """The attacker transforms the embedding table as well: a fixed map is a codebook, no secret."""
        return AdaptiveView(
            codebook=self.transform,
            knows="the overlap matrix (the model's side must know it too), so the transformed table",
        )


@dataclass(frozen=True, kw_only=True)
class GaussianNoise(Defence):
    """Adds independent Gaussian noise of standard deviation ``ratio * scale``."""

    deterministic: ClassVar[bool] = False

    ratio: float = 0.5
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ratio > 0:
            raise ValueError(f"the noise ratio must be > 0; got {self.ratio}. Leave the defence out instead.")

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Noisy vectors (..., D)."""
        noise = torch.randn(x.shape, generator=generator, device=generator.device).to(x.device)
        return (x.float() + self.ratio * self.scale * noise).to(x.dtype)

    def at_scale(self, std: float) -> "GaussianNoise":
        """Noise of ``ratio`` times the spread of one entry."""
        return dataclasses.replace(self, scale=std)

    def noise_length(self, dim: int) -> float:
        """``ratio * scale * sqrt(dim)``, to within a share of about ``1 / (4 dim)``."""
        return self.ratio * self.scale * dim**0.5


@dataclass(frozen=True, kw_only=True)
class DxPrivacy(Defence):
    """Adds noise of density ``exp(-eta ||z||)``: direction uniform, length Gamma(D, 1/eta), drawn for each
    token.

    Source: d_x-privacy, Feyisetan et al. 2020 (arXiv 1910.08902).
    """

    deterministic: ClassVar[bool] = False

    eta: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.eta > 0:
            raise ValueError(
                f"eta must be > 0; got {self.eta}. Smaller means more noise: its mean length is D / eta."
            )

    def noise(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Noise alone, fp32; its length has mean ``D / eta``."""
        width = shape[-1]
        direction = torch.randn(shape, generator=generator, device=generator.device)
        direction = direction / direction.norm(dim=-1, keepdim=True)
        shape_parameter = torch.full((*shape[:-1], 1), float(width), device=generator.device)
        radius = torch._standard_gamma(shape_parameter, generator=generator) / self.eta
        return direction * radius

    def noise_length(self, dim: int) -> float:
        """``dim / eta``, the mean of Gamma(dim, 1/eta)."""
        return dim / self.eta

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Noisy vectors (..., D)."""
        return (x.float() + self.noise(x.shape, generator).to(x.device)).to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class Int8Wire(Defence):
    """Rounds each vector to 8-bit integers with one scale per vector, as a wire format would; hardly a
    defence, and the report shows so."""

    def round_trip(self, x: Tensor) -> Tensor:
        """Quantised and restored vectors (..., D)."""
        step = (x.float().abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        return ((x.float() / step).round() * step).to(x.dtype)

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Quantised and restored vectors (..., D)."""
        return self.round_trip(x)

    def adaptive_view(self) -> AdaptiveView:
        """The attacker rounds the same way."""
        return AdaptiveView(codebook=self.round_trip, knows="the number format")


@dataclass(frozen=True, kw_only=True)
class RandomPermutation(Defence):
    """Permutes the entries of each vector by a fresh secret permutation."""

    deterministic: ClassVar[bool] = False

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Permuted vectors (..., D)."""
        order = torch.rand(x.shape, generator=generator, device=generator.device).argsort(-1).to(x.device)
        return x.gather(-1, order)

    def adaptive_view(self) -> AdaptiveView:
        """Sorted entries do not depend on the permutation.

        Source: the sorting idea is that of "An Attack to Break Permutation-Based Private Third-Party
        Inference Schemes for LLMs", arXiv 2505.18332.
        """
        return AdaptiveView(
            canonical=sorted_entries, knows="that entries are permuted, not how; compares them sorted"
        )


_KINDS: dict[str, tuple[type[Defence], str]] = {
    "none": (NoDefence, ""),
    "dct": (DctOverlap, ""),
    "gauss": (GaussianNoise, "ratio"),
    "dx": (DxPrivacy, "eta"),
    "int8": (Int8Wire, ""),
    "permute": (RandomPermutation, ""),
}


def parse_defence(spec: str) -> Defence:
    """A defence from its short form, ``KIND[:VALUE or NAME=VALUE,...][@SITE]``.

    Args:
        spec: For example ``dct:window=8``, ``gauss:0.5`` (in units of the spread of the states),
            ``dx:40@embedding``, ``int8``, ``permute``, ``none``.

    Returns:
        The defence.

    Raises:
        ValueError: If the kind or an option is unknown, or a value is no number.
    """
    head, _, site = spec.partition("@")
    kind, _, text = head.partition(":")
    if kind not in _KINDS:
        raise ValueError(
            f"unknown defence {spec!r}; known kinds are {', '.join(_KINDS)}, for example gauss:0.5."
        )
    made, first = _KINDS[kind]
    types = {
        field.name: field.type for field in dataclasses.fields(made) if field.name not in ("site", "scale")
    }
    options: dict[str, object] = {"site": site} if site else {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        name, value = (name, value) if equals else (first, name)
        if name not in types:
            known = ", ".join(types) or "none"
            raise ValueError(f"defence {spec!r}: no option {part!r} for {kind}; its options: {known}.")
        try:
            options[name] = float(value) if types[name] is float else int(value)
        except ValueError as error:
            raise ValueError(f"defence {spec!r}: {value!r} is not a number for {name}.") from error
    return made(**options)  # type: ignore[arg-type]
