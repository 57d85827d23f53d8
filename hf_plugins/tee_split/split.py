"""The cut through a decoder stack: which layer goes to which side, and the modules that stand in for the
other side's.

Layers are replaced, never renumbered, so every parameter keeps the name it has in the whole model.
"""

import re
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

Side = Literal["client", "server"]


class SkippedLayer(nn.Module):
    """Stands where the other side's layer is: hands its hidden state on."""

    # What some models ask of a layer before they call it.
    attention_type = "full_attention"
    layer_type = "full_attention"

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The hidden state, whether given by position or by name."""
        return args[0] if args else kwargs["hidden_states"]


class ZeroPositions(nn.Module):
    """Stands for learnt position embeddings on the server: the client has added them already.

    Args:
        embedding: The embedding it replaces; its width and dtype are kept.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.dim, self.dtype = embedding.embedding_dim, embedding.weight.dtype

    def forward(self, position_ids: Tensor) -> Tensor:
        """Zeros of shape ``position_ids.shape + (dim,)``."""
        return torch.zeros(*position_ids.shape, self.dim, dtype=self.dtype, device=position_ids.device)


def check_cut(k: int, num_layers: int) -> None:
    """Check that both sides keep at least one layer.

    Raises:
        ValueError: If they do not.
    """
    if not 1 <= k < num_layers:
        raise ValueError(
            f"the cut k must leave a layer on each side; got k={k} for {num_layers} layers. Take 1 to "
            f"{num_layers - 1}; the paper's choice is {num_layers // 2}."
        )


def kept_layers(k: int, num_layers: int, side: Side) -> range:
    """Layer numbers of one side: the client has 0 to k-1, the server the rest."""
    return range(k) if side == "client" else range(k, num_layers)


def skip_layers(layers: nn.ModuleList, k: int, side: Side) -> None:
    """Replace the other side's layers in place."""
    kept = kept_layers(k, len(layers), side)
    for index in range(len(layers)):
        if index not in kept:
            layers[index] = SkippedLayer()


def layer_number(name: str, prefix: str) -> int | None:
    """The layer that a parameter belongs to.

    Args:
        name: Parameter name, such as ``model.layers.3.mlp.up_proj.weight``.
        prefix: Name of the layer list, such as ``model.layers``.

    Returns:
        Its number, or None if it lies outside of the list.
    """
    found = re.match(re.escape(prefix) + r"\.(\d+)\.", name)
    return int(found.group(1)) if found else None


def names_of_half(
    names: Iterable[str],
    *,
    prefix: str,
    k: int,
    num_layers: int,
    side: Side,
    client_only: Iterable[str],
    server_only: Iterable[str],
) -> list[str]:
    """Parameter names that one half needs.

    Args:
        names: All parameter names of the whole model.
        prefix: Name of the layer list.
        k: The cut.
        num_layers: Of the whole model.
        side: Whose half.
        client_only: Module names that only the client has (embeddings).
        server_only: Module names that only the server has (final norm, head).

    Returns:
        The names, in the order given.
    """
    kept, foreign = kept_layers(k, num_layers, side), tuple(server_only if side == "client" else client_only)
    out = []
    for name in names:
        number = layer_number(name, prefix)
        outside = number is None and not name.startswith(tuple(f"{module}." for module in foreign))
        if outside or (number is not None and number in kept):
            out.append(name)
    return out
