"""The cut: which names belong to which side, and stand-ins that change nothing."""

import pytest
import torch
from torch import nn

from hf_plugins.tee_split.split import (
    SkippedLayer,
    ZeroPositions,
    check_cut,
    kept_layers,
    layer_number,
    names_of_half,
    skip_layers,
)

NAMES = [
    "m.embed.weight",
    "m.layers.0.a.weight",
    "m.layers.1.a.weight",
    "m.layers.10.a.weight",
    "m.norm.weight",
    "head.weight",
]


def test_skipped_layer_hands_on_by_position_and_by_name() -> None:
    x = torch.randn(2, 3)
    assert SkippedLayer()(x, 1, mask=2) is x
    assert SkippedLayer()(hidden_states=x) is x


def test_zero_positions_keep_shape_and_dtype() -> None:
    made = ZeroPositions(nn.Embedding(7, 5).to(torch.bfloat16))(torch.zeros(2, 3, dtype=torch.int64))
    assert made.shape == (2, 3, 5)
    assert made.dtype == torch.bfloat16
    assert not made.any()


@pytest.mark.parametrize("k", [0, 4, 5, -1])
def test_cut_leaves_a_layer_on_each_side(k: int) -> None:
    with pytest.raises(ValueError, match="must leave a layer on each side"):
        check_cut(k, 4)


def test_layers_are_shared_out_without_renumbering() -> None:
    assert (list(kept_layers(1, 3, "client")), list(kept_layers(1, 3, "server"))) == ([0], [1, 2])
    layers = nn.ModuleList([nn.Linear(1, 1) for _ in range(3)])
    skip_layers(layers, 1, "server")
    assert [type(layer) for layer in layers] == [SkippedLayer, nn.Linear, nn.Linear]
    skip_layers(layers := nn.ModuleList([nn.Linear(1, 1) for _ in range(3)]), 2, "client")
    assert [type(layer) for layer in layers] == [nn.Linear, nn.Linear, SkippedLayer]


def test_layer_number_reads_whole_numbers_of_this_list_alone() -> None:
    assert layer_number("m.layers.10.a", "m.layers") == 10
    assert layer_number("m_layers.1.a", "m.layers") is None
    assert layer_number("other.m.layers.1.a", "m.layers") is None


def test_names_of_both_halves_by_hand() -> None:
    options = {
        "prefix": "m.layers",
        "k": 1,
        "num_layers": 11,
        "client_only": ["m.embed"],
        "server_only": ["m.norm", "head"],
    }
    assert names_of_half(NAMES, side="client", **options) == NAMES[:2]
    assert names_of_half(NAMES, side="server", **options) == NAMES[2:]
