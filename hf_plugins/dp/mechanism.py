"""One noisy step: clipped contributions are added up, noise is added once, and the sum is divided by a
constant."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Gaussian = Callable[[Sequence[int], torch.device], Tensor]


class NoisySum:
    """Adds clipped gradients of one step and releases them with noise, once.

    ``g = (sum over units of clip(g_u) + noise_multiplier * max_grad_norm * z) / expected_units``, z standard
    normal. The divisor is a constant: the number of units that happened to be drawn is itself private.

    Args:
        shapes: Shape of each parameter.
        device: Where the sums live.
        max_grad_norm: Clipping norm that every contribution has been held to.
        noise_multiplier: Noise standard deviation over the clipping norm, >= 0.
        expected_units: Expected number of units in a step, > 0.

    Source: Abadi et al. 2016, Algorithm 1; the constant divisor as in Opacus.
    """

    def __init__(
        self,
        shapes: Sequence[torch.Size],
        device: torch.device,
        *,
        max_grad_norm: float,
        noise_multiplier: float,
        expected_units: float,
    ) -> None:
        self._sums = [torch.zeros(shape, device=device) for shape in shapes]
        self._scale = noise_multiplier * max_grad_norm
        self._expected = expected_units
        self._released = False

    @property
    def sums(self) -> list[Tensor]:
        """The sums before noise, float32; private, to be read by tests and reduced over ranks only."""
        return self._sums

    def add(self, contributions: Sequence[Tensor | None]) -> None:
        """Add the clipped sum of one chunk; None stands for a parameter that got no gradient.

        Args:
            contributions: One tensor for each parameter, in the order of ``shapes``.

        Raises:
            RuntimeError: If this step has been released: a later contribution would go without noise.
        """
        if self._released:
            raise RuntimeError("this step has been released with its noise; open a new one for more records.")
        for total, contribution in zip(self._sums, contributions, strict=True):
            if contribution is not None:
                total += contribution

    def add_noise(self, gaussian: Gaussian) -> None:
        """Add the noise of the step; in a distributed run one rank does, before the sums are reduced.

        Args:
            gaussian: Draws standard normal variates of a shape on a device.
        """
        for total in self._sums:
            if self._scale > 0:
                total += self._scale * gaussian(total.shape, total.device)

    def release(self) -> list[Tensor]:
        """The noisy gradients, in the order of ``shapes``, float32.

        Raises:
            RuntimeError: If it has been released before.
        """
        if self._released:
            raise RuntimeError("this step has been released before; its noise pays for one use only.")
        self._released = True
        return [total / self._expected for total in self._sums]
