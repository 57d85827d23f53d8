"""Networks of recipes, and the models that may not be trained."""

import pytest
import torch
from torch import nn

from hf_plugins.dp_fedavg.model import CharacterModel, check_private_model, image_model


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("size", [28, 32, 9])
def test_image_networks(name: str, size: int) -> None:
    net = image_model(name, num_classes=7, size=size)
    assert net(torch.zeros(2, 1, size, size)).shape == (2, 7)
    check_private_model(net)


def test_character_network_looks_only_back() -> None:
    net = CharacterModel(11).eval()
    text = torch.randint(0, 11, (1, 6), generator=torch.Generator().manual_seed(0))
    other = text.clone()
    other[0, 4] = (other[0, 4] + 1) % 11
    one, two = net(text), net(other)
    assert one.shape == (1, 6, 11)
    assert torch.equal(one[:, :4], two[:, :4])
    assert not torch.equal(one[:, 4], two[:, 4])


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(3),
        nn.SyncBatchNorm(3),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.LazyBatchNorm1d(),
    ],
)
def test_batch_norm_is_refused_by_name(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match="^1.norm is a .*Replace it by GroupNorm or LayerNorm"):
        check_private_model(nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"norm": layer})))


def test_instance_norm_with_running_statistics_is_refused() -> None:
    check_private_model(nn.InstanceNorm1d(3))
    with pytest.raises(ValueError, match="that is neither clipped nor noised"):
        check_private_model(nn.InstanceNorm1d(3, track_running_stats=True))


def test_unknown_network() -> None:
    with pytest.raises(ValueError, match="model must be mlp or cnn for images"):
        image_model("vit", num_classes=2, size=8)
