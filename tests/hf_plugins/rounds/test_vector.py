"""Flat vectors: order, dtypes, 0-d parameters, and refusals that say what to do."""

import pytest
import torch
from torch import nn

from hf_plugins.rounds.vector import TrainableVector, digest, flat_vector


class Odd(nn.Module):
    """A 0-d parameter, a frozen one, a buffer, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.first = nn.Linear(2, 2, bias=False)
        self.second = nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("count", torch.zeros((), dtype=torch.long))


def test_round_trip_keeps_order_and_counts_tied_weights_once() -> None:
    model = Odd()
    weights = TrainableVector(model)
    assert weights.names == ["scale", "first.weight"]
    assert weights.sizes == [1, 4]
    assert len(weights) == 5
    weights.write_(torch.arange(5.0))
    assert float(model.scale.detach()) == 0.0
    assert model.second.weight.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert torch.equal(weights.read(), torch.arange(5.0))
    named = weights.named(torch.arange(5.0))
    assert named["scale"].shape == ()
    assert torch.equal(weights.flatten(named), torch.arange(5.0))
    assert torch.equal(weights.split(torch.zeros(3, 5))[1], torch.zeros(3, 2, 2))


def test_gradient_of_an_unused_parameter_is_zero() -> None:
    model = Odd()
    weights = TrainableVector(model)
    model.first(torch.ones(1, 2)).sum().backward()
    assert weights.read_gradient().tolist() == [0.0, 1.0, 1.0, 1.0, 1.0]
    weights.write_(torch.zeros(5))
    assert model.first.weight.grad is None


def test_bf16_parameters_travel_as_float32() -> None:
    model = nn.Linear(2, 1, bias=False).bfloat16()
    weights = TrainableVector(model)
    assert weights.read().dtype == torch.float32
    weights.write_(torch.tensor([1.0, 1.001]))
    assert model.weight.dtype == torch.bfloat16


def test_buffers_are_put_back() -> None:
    model = nn.BatchNorm1d(2)
    weights = TrainableVector(model)
    saved = weights.buffers()
    model(torch.randn(8, 2) + 5)
    weights.restore_buffers_(saved)
    assert model.running_mean.tolist() == [0.0, 0.0]


def test_refusals() -> None:
    frozen = nn.Linear(1, 1).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter; set requires_grad"):
        TrainableVector(frozen)
    odd = nn.Linear(1, 1)
    odd.weight = nn.Parameter(torch.zeros(1, 1, dtype=torch.complex64))
    with pytest.raises(ValueError, match="must be real floating point"):
        TrainableVector(odd)
    weights = TrainableVector(nn.Linear(2, 1))
    with pytest.raises(ValueError, match="Was it made for another model"):
        weights.write_(torch.zeros(4))
    with pytest.raises(ValueError, match="in one of model and message only"):
        weights.flatten({"weight": torch.zeros(1, 2)})
    with pytest.raises(ValueError, match="must have shape"):
        weights.flatten({"weight": torch.zeros(2, 1), "bias": torch.zeros(1)})


def test_digest_sees_one_bit() -> None:
    vector = torch.zeros(10)
    other = vector.clone()
    other[3] = 1e-30
    assert digest(vector) == digest(torch.zeros(10))
    assert digest(vector) != digest(other)
    assert flat_vector([torch.tensor(1.0), torch.zeros(0), torch.ones(1, 1)]).tolist() == [1.0, 1.0]
