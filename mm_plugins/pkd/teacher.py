"""The frozen half of a pair: backbone and neck without gradients, loaded strictly, known by its
fingerprint."""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

TeacherMode = Literal["eval", "official"]
"""``eval``: wholly in evaluation mode. ``official``: only BatchNorm is, dropout and drop path stay active."""

PARTS: tuple[str, ...] = ("backbone.", "neck.")
"""Prefixes of the checkpoint keys that a teacher needs."""


class FrozenTeacher(nn.Module):
    """Backbone and neck of a detector, without gradients.

    Args:
        backbone: Gives the maps of its stages.
        neck: Turns them into the maps that the head sees; None passes them on.
        mode: See `TeacherMode`.
    """

    def __init__(self, backbone: nn.Module, neck: nn.Module | None, *, mode: TeacherMode = "eval") -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = nn.Identity() if neck is None else neck
        self.requires_grad_(False)
        self.train(mode == "official")
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps of all levels, finest first, as the detector's head would see them."""
        return tuple(self.neck(self.backbone(images)))


def part_of(state: Mapping[str, Tensor], prefixes: Sequence[str]) -> dict[str, Tensor]:
    """The entries whose names start with one of the prefixes, with the versions of the modules."""
    chosen = OrderedDict((name, value) for name, value in state.items() if name.startswith(tuple(prefixes)))
    # torch keeps the versions of the modules beside the entries; loaders of older layers read them.
    chosen.__dict__.update(vars(state) if hasattr(state, "__dict__") else {})
    return chosen


def key_problems(module: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Load weights into a module and list, in words, every name that does not fit; empty if all fit.

    Args:
        module: Receives the weights that fit, in place.
        weights: Names and tensors, all of which the module shall have.

    Returns:
        One line for each kind of problem.
    """
    own = module.state_dict()
    misshaped = [
        f"{name} is {tuple(value.shape)}, needs {tuple(own[name].shape)}"
        for name, value in weights.items()
        if name in own and value.shape != own[name].shape
    ]
    if misshaped:
        missing = [name for name in own if name not in weights]
        unexpected = [name for name in weights if name not in own]
    else:
        # torch's own loader, because modules may rename keys of older versions while loading.
        missing, unexpected = module.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    kinds = {"missing": missing, "of another shape": misshaped, "not in the model": unexpected}
    return [
        f"{len(names)} {kind} ({'; '.join(names[:3])}{' ...' if len(names) > 3 else ''})"
        for kind, names in kinds.items()
        if names
    ]


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over names and bytes of all parameters and buffers; the same however the file was written."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
