"""DPNASNet: stem, three cells of one genotype with pooling between them, 1x1 adapter, two-layer classifier.

No BatchNorm, no affine normalisation, no bias in convolutions: nothing couples the samples of a batch, and
few parameters receive noise.
"""

# Shapes: N images, C channels, H x W pixels, L class logits.

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from hf_plugins.dpnas.genotypes import EDGES, NUM_NODES, OPERATIONS, Genotype

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "selu": nn.SELU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
    "linear": nn.Identity,
    "hardtanh": nn.Hardtanh,
    "sigmoid": nn.Sigmoid,
}
_ADAPTED = 128


def has_weights(operation: int) -> bool:
    """Whether an operation carries a convolution."""
    return OPERATIONS[operation].startswith("sep_conv")


def make_operation(operation: int, channels: int, *, groups: int, fifth: Literal["selu", "elu"]) -> nn.Module:
    """Module of one operation, (N, C, H, W) to the same shape; ``none`` has no module and is left out by the
    cell.
    """
    name = OPERATIONS[operation]
    if name == "max_pool_3x3":
        return nn.MaxPool2d(3, stride=1, padding=1)
    if name == "avg_pool_3x3":
        return nn.AvgPool2d(3, stride=1, padding=1)
    if name == "skip_connect":
        return nn.Identity()
    kind = name.removeprefix("sep_conv_3x3_")
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
        nn.GroupNorm(groups, channels, affine=False),
        ACTIVATIONS[fifth if kind == "selu" else kind](),
    )


def _conv_norm(in_channels: int, out_channels: int, kernel_size: int, groups: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(groups, out_channels, affine=False))


class Cell(nn.Module):
    """A directed graph of five nodes; its output is their concatenation, 5C channels.

    Source: DPNAS, arXiv 2110.08557, search space; cells without activation around them as in the release.
    """

    def __init__(
        self,
        genotype: Genotype,
        in_channels: int,
        channels: int,
        *,
        groups: int,
        fifth: Literal["selu", "elu"],
    ) -> None:
        super().__init__()
        self.preprocess = _conv_norm(in_channels, channels, 1, groups)
        self.edges = nn.ModuleDict(
            {
                f"{f}_{t}": make_operation(op, channels, groups=groups, fifth=fifth)
                for op, (f, t) in zip(genotype.operations, EDGES, strict=True)
                if op != 0
            }
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, 5C, H, W)."""
        nodes = [self.preprocess(x_NCHW)]
        for node in range(1, NUM_NODES + 1):
            terms = [self.edges[f"{f}_{node}"](nodes[f]) for f in range(node) if f"{f}_{node}" in self.edges]
            nodes.append(sum(terms[1:], start=terms[0]) if terms else torch.zeros_like(nodes[0]))
        return torch.cat(nodes[1:], dim=1)


class DPNASNet(nn.Module):
    """The whole network for square images.

    Args:
        genotype: The cell, used three times.
        in_channels: Channels of the image.
        image_size: Side of the image in pixels; three poolings halve it, rounding down.
        num_labels: Classes.
        stem_channels: Channels after the stem.
        cell_channels: Channels C of the three cells.
        groups: Groups of every GroupNorm; the release takes 8 for final nets and 4 in its search.
        head_activation: Activation inside the classifier: ``selu`` (CIFAR-10) or ``tanh`` (MNIST) in the
            release.
        fifth: Activation of operation 5: ``selu`` (release of the final nets) or ``elu`` (release of the
            search).

    Raises:
        ValueError: If the image is too small for three poolings or channels do not divide into groups.

    Source: DPNAS, arXiv 2110.08557; widths and classifier as in the release (parameters 529,434 for
        CIFAR-10).
    """

    def __init__(
        self,
        genotype: Genotype,
        *,
        in_channels: int,
        image_size: int,
        num_labels: int,
        stem_channels: int,
        cell_channels: Sequence[int],
        groups: int = 8,
        head_activation: str = "selu",
        fifth: Literal["selu", "elu"] = "selu",
    ) -> None:
        super().__init__()
        if image_size < 2 ** len(cell_channels):
            raise ValueError(
                f"image_size={image_size} is too small: {len(cell_channels)} poolings need at least "
                f"{2 ** len(cell_channels)} pixels a side."
            )
        uneven = [c for c in (stem_channels, *cell_channels) if c % groups]
        if uneven:
            raise ValueError(f"channels must divide into groups={groups}; got {uneven}.")
        self.in_channels, self.image_size = in_channels, image_size
        self.stem = _conv_norm(in_channels, stem_channels, 3, groups)
        self.cells = nn.ModuleList()
        previous, side = stem_channels, image_size
        for channels in cell_channels:
            self.cells.append(Cell(genotype, previous, channels, groups=groups, fifth=fifth))
            previous, side = NUM_NODES * channels, side // 2
        self.pool = nn.MaxPool2d(2, 2)
        self.adapt = _conv_norm(previous, _ADAPTED, 1, groups)
        self.classifier = nn.Sequential(
            nn.Linear(_ADAPTED * side * side, _ADAPTED),
            ACTIVATIONS[head_activation](),
            nn.Linear(_ADAPTED, num_labels),
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits (N, L) of images (N, C, H, W).

        Raises:
            ValueError: If the images have another size than the network was made for.
        """
        wanted = (self.in_channels, self.image_size, self.image_size)
        if tuple(x_NCHW.shape[1:]) != wanted:
            raise ValueError(
                f"this network takes images of {wanted} (channels, height, width); got "
                f"{tuple(x_NCHW.shape[1:])}. Resize them, or build it with another image_size."
            )
        # On a CPU the pooling and depthwise layers are several times faster with channels last. Asked for
        # after the stem: a grey image lies in both orders at once, and its convolution takes the other one.
        # By axes, since vmap knows no memory formats.
        x_NCHW = self.stem(x_NCHW).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        for cell in self.cells:
            x_NCHW = self.pool(cell(x_NCHW))
        return self.classifier(self.adapt(x_NCHW).flatten(1))


@torch.no_grad()
def initialise_(network: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw convolution weights from N(0, 2/(k*k*C_out)), He's rule as the release writes it (groups not
    counted).
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            module.weight.normal_(0, (2.0 / fan) ** 0.5, generator=generator)


def official_name(name: str) -> str:
    """Name that one of our parameters has in a checkpoint of the authors' release."""
    parts = name.split(".")
    if parts[0] == "cells":
        parts[1] = str(2 * int(parts[1]))
        if parts[2] == "preprocess":
            parts[2] = "preprocess1"
        else:
            parts[2:4] = ["_ops", parts[3], "op"]
    if parts[0] == "classifier":
        parts[0] = "cls"
    return ".".join(parts)
