"""A model's trainable parameters as one flat vector, and back."""

# Shapes: D trainable numbers of the model.

import math
import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class Layout:
    """Names and shapes of the tensors that make up a vector, in order.

    Args:
        shapes: ``{name: shape}``.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.names = list(shapes)
        self.shapes = [tuple(shape) for shape in shapes.values()]
        self.sizes = [math.prod(shape) for shape in self.shapes]

    def __len__(self) -> int:
        return sum(self.sizes)

    def split(self, vector_D: Tensor) -> list[Tensor]:
        """Views of a vector in the shapes of the parameters; leading axes before the last are kept.

        Raises:
            ValueError: If the vector has another length than the model.
        """
        if vector_D.shape[-1:] != (len(self),):
            raise ValueError(
                f"a vector of {len(self)} numbers is needed for this model; got shape "
                f"{tuple(vector_D.shape)}. Was it made for another model, or before adapters were added?"
            )
        lead = vector_D.shape[:-1]
        parts = vector_D.split(self.sizes, dim=-1)
        return [part.reshape((*lead, *shape)) for part, shape in zip(parts, self.shapes, strict=True)]

    def named(self, vector_D: Tensor) -> dict[str, Tensor]:
        """The vector as ``{parameter name: tensor}``; views."""
        return dict(zip(self.names, self.split(vector_D), strict=True))

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """``{parameter name: tensor}`` as a vector ``[D]`` float32.

        Raises:
            ValueError: If names or shapes are not the model's.
        """
        if set(tensors) != set(self.names):
            odd = sorted(set(tensors) ^ set(self.names))
            raise ValueError(f"these names are in one of model and message only: {odd[:4]}. Same model?")
        for name, shape in zip(self.names, self.shapes, strict=True):
            if tuple(tensors[name].shape) != shape:
                raise ValueError(
                    f"{name} must have shape {shape}; got {tuple(tensors[name].shape)}. Same model?"
                )
        return flat_vector([tensors[name] for name in self.names])


class TrainableVector(Layout):
    """Order, names and shapes of a model's trainable parameters.

    Only parameters with ``requires_grad`` take part: with LoRA these are the adapters alone. Tied parameters
    count once. Buffers take no part and are put back after a client has trained.

    Args:
        model: The module; read and written in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError(
                "the model has no trainable parameter; set requires_grad, or add adapters with PEFT."
            )
        wrong = [name for name, p in named if not p.dtype.is_floating_point]
        if wrong:
            raise ValueError(
                f"trainable parameters must be real floating point; {wrong[0]} is not. Freeze it "
                "(requires_grad=False) or cast the model."
            )
        super().__init__({name: tuple(p.shape) for name, p in named})
        self.parameters = [p for _, p in named]

    def read(self) -> Tensor:
        """The parameters now, ``[D]`` float32 on the CPU; a copy."""
        return flat_vector([p.detach() for p in self.parameters])

    def read_gradient(self) -> Tensor:
        """The gradients now, ``[D]`` float32 on the CPU; a parameter without one counts as zeros."""
        return flat_vector([torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters])

    def write_(self, vector_D: Tensor) -> None:
        """Set the parameters in place and drop their gradients.

        Args:
            vector_D: Values, cast to each parameter's dtype and device.
        """
        with torch.no_grad():
            for p, part in zip(self.parameters, self.split(vector_D), strict=True):
                p.copy_(part)
                p.grad = None

    def buffers(self) -> list[Tensor]:
        """Copies of the model's buffers, for `restore_buffers_`."""
        return [buffer.detach().clone() for buffer in self.model.buffers()]

    def restore_buffers_(self, saved: list[Tensor]) -> None:
        """Put buffers back that training has changed: they are one client's and never leave it."""
        with torch.no_grad():
            for buffer, value in zip(self.model.buffers(), saved, strict=True):
                buffer.copy_(value)


def flat_vector(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors one after the other as ``[D]`` float32 on the CPU."""
    return torch.cat([t.float().reshape(-1).cpu() for t in tensors])


def digest(vector_D: Tensor) -> int:
    """Checksum of a vector's bytes (CRC-32), by which a server knows from which model an update started."""
    return zlib.crc32(vector_D.detach().float().contiguous().cpu().numpy().tobytes())
