"""The four sub-networks: by hand with numbers for convolutions, and the exactness of joined flows."""

import pytest
import torch
from torch import Tensor, nn

from mm_plugins.spatialflow.flows import (
    SubNetworks,
    forward_all,
    forward_boxes,
    receive,
    split_steering,
)


class Times(nn.Module):
    """Stands for a convolution: multiplies by a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def numbers(**changes: list) -> SubNetworks:
    """K = 2 steps, J = 1 mask step; each layer multiplies by its own prime."""
    layers: dict = {
        "reg": [2, 3],
        "cls": [5, 7],
        "stuff": [11, 13],
        "mask": [17],
        "cls_flow": [19, 23],
        "stuff_flow": [29, 31],
        "mask_flow": [37],
        "stuff_mask_flow": [41],
    }
    layers |= changes
    return SubNetworks(**{name: [Times(f) for f in factors] for name, factors in layers.items()})


def test_two_steps_by_hand() -> None:
    """x = 1. r1 = 2, r2 = 6. c1 = 5 (1 + 19*2) = 195, c2 = 7 (195 + 23*6) = 2331.
    s1 = 11 (1 + 29*2) = 649, s2 = 13 (649 + 31*6) = 10855. m = 17 (1 + 41*s2 + 37*r2) = 7569726."""
    out = forward_all(torch.ones(1, 1, 1, 1), numbers())
    assert (float(out.reg), float(out.cls)) == (6.0, 2331.0)
    assert float(out.stuff) == 10855.0
    assert float(out.mask) == 17 * (1 + 41 * 10855 + 37 * 6)
    boxes = forward_boxes(torch.ones(1, 1, 1, 1), numbers())
    assert (float(boxes.reg), float(boxes.cls), boxes.stuff, boxes.mask) == (6.0, 2331.0, None, None)


def test_two_mask_steps_by_hand() -> None:
    """J = K = 2: m1 = 17 (1 + 41*s1 + 37*r1), m2 = 43 (m1 + 47*s2 + 53*r2)."""
    nets = numbers(mask=[17, 43], mask_flow=[37, 53], stuff_mask_flow=[41, 47])
    first = 17 * (1 + 41 * 649 + 37 * 2)
    out = forward_all(torch.ones(1, 1, 1, 1, dtype=torch.float64), nets)
    assert float(out.mask) == 43 * (first + 47 * 10855 + 53 * 6)


@pytest.mark.parametrize(
    ("absent", "changed"),
    [
        ("cls_flow", {"cls": 7 * 5.0}),
        ("stuff_flow", {"stuff": 13 * 11.0, "mask": 17.0 * (1 + 41 * 143 + 37 * 6)}),
        ("mask_flow", {"mask": 17.0 * (1 + 41 * 10855)}),
        ("stuff_mask_flow", {"mask": 17.0 * (1 + 37 * 6)}),
    ],
)
def test_a_missing_flow_changes_what_it_reaches_and_nothing_else(
    absent: str, changed: dict[str, float]
) -> None:
    whole = forward_all(torch.ones(1, 1, 1, 1), numbers())
    without = forward_all(torch.ones(1, 1, 1, 1), numbers(**{absent: []}))
    for name in ("cls", "reg", "stuff", "mask"):
        expected = changed.get(name, float(getattr(whole, name)))
        assert float(getattr(without, name)) == expected


def test_steering_splits_offsets_and_modulation() -> None:
    out = torch.arange(27.0).view(1, 27, 1, 1) - 22
    offset, modulation = split_steering(out)
    assert offset.flatten().tolist() == [float(v) for v in range(-22, -4)]
    torch.testing.assert_close(modulation.flatten(), torch.arange(-4.0, 5.0).sigmoid())


def test_a_steered_step_reads_the_sum_and_convolves_the_feature_alone() -> None:
    seen = {}

    def conv(feature: Tensor, offset: Tensor, modulation: Tensor) -> Tensor:
        seen.update(feature=feature, offset=offset, modulation=modulation)
        return feature

    def flow(x: Tensor) -> Tensor:
        seen["read"] = x
        return torch.zeros(1, 27, 1, 1)

    feature, source = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 5.0)
    assert float(receive(conv, feature, source, flow, steered=True)) == 2.0
    assert float(seen["read"]) == 7.0
    assert (seen["modulation"] == 0.5).all()
    assert (seen["offset"] == 0).all()
    assert seen["offset"].shape[1] == 18


def test_a_steered_mask_step_is_steered_before_the_stuff_path_is_added() -> None:
    """o reads x + r2 = 1 + 6; the convolution gets x + 41*s2."""
    read, got = [], []

    class Steer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            read.append(float(x))
            return torch.zeros(1, 27, 1, 1)

    def mask(feature: Tensor, offset: Tensor, modulation: Tensor) -> Tensor:
        got.append(float(feature))
        return feature

    nets = numbers()._replace(mask=[mask], mask_flow=[Steer()], steered_mask=frozenset({0}))
    forward_all(torch.ones(1, 1, 1, 1), nets)
    assert read == [7.0]
    assert got == [1 + 41 * 10855.0]


class Conv(nn.Module):
    """A flow as the head builds it: the convolution is called ``conv``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.parametrize("absent", [(), ("cls_flow",), ("mask_flow", "stuff_flow")])
def test_joined_flows_give_the_same_numbers(absent: tuple[str, ...]) -> None:
    """Joining output channels changes no sum; fp32 rounding inside of a library may, by a few ulp."""
    torch.manual_seed(0)
    sizes = dict(reg=3, cls=3, stuff=3, mask=2, cls_flow=3, stuff_flow=3, mask_flow=2, stuff_mask_flow=2)
    layers = {name: [] if name in absent else [Conv() for _ in range(n)] for name, n in sizes.items()}
    nets, x = SubNetworks(**layers), torch.randn(2, 8, 9, 7)
    for one, other in zip(forward_all(x, nets), forward_all(x, nets, fuse=True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
