"""DPNASNet against the release: parameter counts, feature shapes, recorded logits; and what DP-SGD asks of
it.
"""

import pytest
import torch
from torch import nn

from hf_plugins.dpnas.config import SHAPES
from hf_plugins.dpnas.genotypes import RELEASED, Genotype, random_genotype
from hf_plugins.dpnas.network import Cell, DPNASNet, initialise_, official_name
from tests.hf_plugins.dpnas.reference import cell_output

# Logits of the authors' models (repository TheSunWillRise/DPNAS, commit 867fc24, dp_evaluate/models.py, run
# with torch # 2.13 on the CPU) for the weights and images of `by_formula`.
RECORDED = {
    "cifar10": [
        [
            -0.931522,
            -0.1742,
            0.845146,
            0.062426,
            -0.748377,
            0.197209,
            0.867418,
            -0.251167,
            -0.890692,
            0.222917,
        ],
        [
            -0.892463,
            -0.223623,
            0.812469,
            0.116068,
            -0.722627,
            0.140241,
            0.849023,
            -0.191824,
            -0.87996,
            0.162188,
        ],
    ],
    "mnist": [
        [
            -0.673909,
            -0.112997,
            0.618936,
            0.076882,
            -0.492288,
            0.151797,
            0.588678,
            -0.215493,
            -0.657998,
            0.139537,
        ],
        [
            -0.696037,
            -0.109922,
            0.640667,
            0.071001,
            -0.51326,
            0.160386,
            0.60854,
            -0.226646,
            -0.67642,
            0.153069,
        ],
    ],
    "fashion_mnist": [
        [
            -0.461542,
            -0.017352,
            0.553902,
            -0.074964,
            -0.666145,
            -0.00473,
            0.53519,
            -0.099919,
            -0.445089,
            0.311024,
        ],
        [
            -0.452626,
            -0.016738,
            0.544907,
            -0.074416,
            -0.65722,
            -0.00643,
            0.526486,
            -0.097095,
            -0.436749,
            0.307122,
        ],
    ],
}


def released(name: str) -> DPNASNet:
    return DPNASNet(RELEASED[name], **SHAPES[name])


def by_formula(net: DPNASNet) -> torch.Tensor:
    """Weights sin(0.7 j + i) / 10 for entry j of the i-th tensor by official name, images cos(0.37 j); fills
    ``net``.
    """
    state = net.state_dict()
    for i, (_, value) in enumerate(sorted((official_name(name), v) for name, v in state.items())):
        entries = torch.sin(torch.arange(value.numel(), dtype=torch.float64) * 0.7 + i) * 0.1
        value.copy_(entries.view(value.shape).float())
    net.load_state_dict(state)
    c, s = net.in_channels, net.image_size
    return torch.cos(torch.arange(2 * c * s * s, dtype=torch.float64) * 0.37).view(2, c, s, s).float()


@pytest.mark.parity
@pytest.mark.parametrize("name", RECORDED)
def test_logits_equal_the_authors_models(name: str) -> None:
    net = released(name)
    images = by_formula(net)
    torch.testing.assert_close(net(images), torch.tensor(RECORDED[name]), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "total", "blocks"),
    [
        ("cifar10", 529434, [1296, 5760, 29952, 105984, 122880, 263562]),
        ("mnist", 213418, [288, 2752, 6848, 13696, 40960, 148874]),
        ("fashion_mnist", 214570, None),
    ],
)
def test_parameter_counts_of_the_release(name: str, total: int, blocks: list[int] | None) -> None:
    net = released(name)
    parts = [net.stem, *net.cells, net.adapt, net.classifier]
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert sum(counts) == sum(p.numel() for p in net.parameters()) == total
    if blocks is not None:
        assert counts == blocks


@pytest.mark.parametrize(("name", "shapes"), [("cifar10", [240, 480, 960]), ("mnist", [160, 160, 320])])
def test_feature_shapes(name: str, shapes: list[int]) -> None:
    net = released(name)
    seen = []
    for cell in net.cells:
        cell.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape[1:])))
    side = net.image_size
    net(torch.zeros(1, net.in_channels, side, side))
    assert seen == [
        (shapes[0], side, side),
        (shapes[1], side // 2, side // 2),
        (shapes[2], side // 4, side // 4),
    ]


def test_nothing_couples_samples_and_no_norm_is_trained() -> None:
    net = released("mnist")
    assert not list(net.buffers())
    assert not [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert all(m.weight is None for m in net.modules() if isinstance(m, nn.GroupNorm))
    assert all(m.bias is None for m in net.modules() if isinstance(m, nn.Conv2d))
    images = torch.randn(3, 1, 28, 28)
    torch.testing.assert_close(net(images)[1:2], net(images[1:2]), atol=1e-5, rtol=0)


def test_cell_is_the_sum_over_edges() -> None:
    generator = torch.Generator().manual_seed(3)
    for cell in (
        RELEASED["cifar10"],
        Genotype((0,) * 15),
        random_genotype(generator),
        random_genotype(generator),
    ):
        module = Cell(cell, 8, 16, groups=4, fifth="selu")
        x = torch.randn(2, 8, 6, 6, generator=generator)
        torch.testing.assert_close(module(x), cell_output(module, cell, x), atol=0, rtol=0)


def test_a_node_without_operations_is_zero() -> None:
    module = Cell(Genotype((0,) * 15), 8, 16, groups=4, fifth="selu")
    out = module(torch.randn(1, 8, 4, 4))
    assert out.shape == (1, 80, 4, 4)
    assert not out.any()


@pytest.mark.parametrize("name", RECORDED)
def test_every_parameter_is_alive(name: str) -> None:
    net = released(name)
    net(torch.randn(4, net.in_channels, net.image_size, net.image_size)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_initial_spread_is_hes_rule_over_all_outputs() -> None:
    """The 3x3 stem of the CIFAR net has 48 outputs: std = sqrt(2 / (9 * 48)) = 0.068; 1,296 draws give +-2 %
    (1 sigma).
    """
    net = released("cifar10")
    initialise_(net, torch.Generator().manual_seed(0))
    assert net.stem[0].weight.std().item() == pytest.approx((2 / 432) ** 0.5, rel=0.12)
    depthwise = net.cells[2].edges["0_1"][0].weight
    assert depthwise.std().item() == pytest.approx((2 / (9 * 192)) ** 0.5, rel=0.12)


def test_elu_and_selu_differ_only_where_operation_five_is() -> None:
    one, other = (DPNASNet(RELEASED["mnist"], **SHAPES["mnist"], fifth=kind) for kind in ("selu", "elu"))
    other.load_state_dict(one.state_dict())
    x = torch.randn(1, 1, 28, 28)
    assert not torch.allclose(one(x), other(x))
    linear = Genotype((7,) * 15)
    one, other = (DPNASNet(linear, **SHAPES["mnist"], fifth=kind) for kind in ("selu", "elu"))
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(one(x), other(x), atol=0, rtol=0)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes images of \(1, 28, 28\).*got \(3, 32, 32\). Resize them"):
        released("mnist")(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="image_size=4 is too small: 3 poolings need at least 8 pixels"):
        DPNASNet(RELEASED["mnist"], **{**SHAPES["mnist"], "image_size": 4})
    with pytest.raises(ValueError, match=r"channels must divide into groups.*=5; got \[32, 32, 32, 64\]"):
        DPNASNet(RELEASED["mnist"], **SHAPES["mnist"], groups=5)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_cells_compute_with_channels_last(name: str) -> None:
    """In the usual order a CPU takes several times longer; grey images lie in both orders, colour ones in
    one.
    """
    shape = SHAPES[name]
    network = released(name)
    seen = []
    for module in network.modules():
        if isinstance(module, nn.MaxPool2d):
            module.register_forward_hook(
                lambda _, inputs, __: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
            )
    network(torch.randn(2, shape["in_channels"], shape["image_size"], shape["image_size"]))
    assert len(seen) > 3
    assert all(seen)
