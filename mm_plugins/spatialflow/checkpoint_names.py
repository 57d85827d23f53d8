"""Weights of the authors' release under the names, and with the channel order, of this suite."""

from collections.abc import Mapping

import torch
from torch import Tensor

THINGS_CHANNEL = 36
"""Where the release's stuff head has its channel for things: categories sorted by id, "things-other" is
183."""
PREFIXES = {
    "backbone.": "backbone.",
    "neck.": "neck.",
    "bbox_head.": "bbox_head.",
    "mask_head.": "roi_head.mask_head.",
    "stuff_head.": "semantic_head.",
}


def things_last(rows: Tensor, things_channel: int = THINGS_CHANNEL) -> Tensor:
    """Move the channel of things to the end.

    Args:
        rows: One row a class, stuff classes and things.
        things_channel: Row of things.

    Returns:
        The rows in mmdet's order.
    """
    order = [i for i in range(len(rows)) if i != things_channel] + [things_channel]
    return rows[torch.tensor(order)]


def convert_release(
    weights: Mapping[str, Tensor], *, things_channel: int = THINGS_CHANNEL
) -> dict[str, Tensor]:
    """State dict of `SpatialFlow` from that of the release (a fork of mmdet 2.3).

    Args:
        weights: State dict of the release.
        things_channel: Row of things in its stuff classifier.

    Returns:
        State dict of this suite; tensors are shared but for the classifier of stuff.

    Raises:
        ValueError: If names are none of the release.
    """
    strange = [name for name in weights if not name.startswith(tuple(PREFIXES))]
    absent = [prefix for prefix in PREFIXES if not any(name.startswith(prefix) for name in weights)]
    if strange or absent:
        raise ValueError(
            f"these are not the release's weights: unknown {strange[:3]}, nothing that starts with {absent}. "
            "Give the state dict of a SpatialFlow checkpoint of chensnathan/SpatialFlow; one of this suite "
            "needs no conversion."
        )
    converted = {}
    for name, tensor in weights.items():
        prefix = next(p for p in PREFIXES if name.startswith(p))
        if name.startswith("stuff_head.conv."):
            if not 0 <= things_channel < len(tensor):
                raise ValueError(
                    f"things_channel={things_channel} is none of the {len(tensor)} channels of {name}. "
                    "Count the stuff categories whose id is smaller than that of things-other."
                )
            tensor = things_last(tensor, things_channel)
        converted[PREFIXES[prefix] + name.removeprefix(prefix)] = tensor
    return converted
