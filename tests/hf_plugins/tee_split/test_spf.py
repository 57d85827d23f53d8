"""The row-sparse layer against a dense one, its gradient, and weights that stay as they are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_plugins.tee_split.spf import SpfLinear
from tests.hf_plugins.tee_split.reference import spf_dense


def layer(
    rows: list[int], *, inputs: int = 3, outputs: int = 6, bias: bool = True, conv: bool = False
) -> SpfLinear:
    base = Conv1D(outputs, inputs) if conv else nn.Linear(inputs, outputs, bias=bias)
    base.requires_grad_(False)
    made = SpfLinear(
        base, torch.tensor(rows, dtype=torch.int64), in_features=inputs, out_features=outputs, transposed=conv
    )
    with torch.no_grad():
        made.spf_delta.normal_()
    return made


@given(st.data(), st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_forward_is_the_dense_layer_of_the_reference(data: st.DataObject, bias: bool, conv: bool) -> None:
    rows = sorted(data.draw(st.sets(st.integers(0, 5), max_size=6)))
    made, x = layer(rows, bias=bias, conv=conv), torch.randn(2, 4, 3)
    weight = made.weight.T if conv else made.weight
    expected = spf_dense(x, weight, made.bias, rows, made.spf_delta)
    torch.testing.assert_close(made(x), expected, atol=1e-5, rtol=1e-5)
    before = made(x)
    torch.testing.assert_close(made.merge()(x), before, atol=1e-6, rtol=1e-5)


def test_gradients_are_exact() -> None:
    made = layer([0, 2, 5]).double()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(made, {"spf_delta": delta}, (x,))

    assert torch.autograd.gradcheck(run, (x, made.spf_delta.detach().requires_grad_()))


def test_gradient_is_the_chosen_rows_of_the_dense_gradient() -> None:
    made, x = layer([1, 4]), torch.randn(5, 3)
    dense = nn.Linear(3, 6)
    with torch.no_grad():
        dense.weight.copy_(made.weight)
        dense.weight[[1, 4]] += made.spf_delta
        dense.bias.copy_(made.bias)
    made(x).square().sum().backward()
    dense(x).square().sum().backward()
    torch.testing.assert_close(made.spf_delta.grad, dense.weight.grad[[1, 4]], atol=1e-5, rtol=1e-5)
    assert made.weight.grad is None


def test_frozen_entries_do_not_move_in_100_steps_with_weight_decay() -> None:
    made = layer([1, 4])
    before = made.weight.clone()
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(100):
        made(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(made.weight, before)
    assert len(optimizer.state) == 1
    merged = made.merge().weight
    untouched = [0, 2, 3, 5]
    assert torch.equal(merged[untouched], before[untouched])
    assert not torch.equal(merged[[1, 4]], before[[1, 4]])


def test_all_rows_train_like_a_dense_layer() -> None:
    made, x = layer(list(range(6)), bias=False), torch.randn(64, 3)
    dense = nn.Linear(3, 6, bias=False)
    with torch.no_grad():
        made.spf_delta.zero_()
        dense.weight.copy_(made.weight)
    pairs = [(made, [made.spf_delta]), (dense, [dense.weight])]
    for model, parameters in pairs:
        optimizer = torch.optim.SGD(parameters, lr=0.01)
        for _ in range(20):
            (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(made.weight + made.spf_delta, dense.weight, atol=1e-6, rtol=1e-5)


def test_difference_is_fp32_under_a_bfloat16_model() -> None:
    base = nn.Linear(3, 6).to(torch.bfloat16).requires_grad_(False)
    made = SpfLinear(base, torch.tensor([1]), in_features=3, out_features=6)
    y = made(torch.randn(2, 3, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert made.spf_delta.dtype == made.spf_delta.grad.dtype == torch.float32


@pytest.mark.parametrize("rows", [[1, 1], [2, 1], [6], [-1]])
def test_wrong_rows(rows: list[int]) -> None:
    with pytest.raises(ValueError, match="rows must be sorted, unique"):
        SpfLinear(nn.Linear(3, 6), torch.tensor(rows), in_features=3, out_features=6)
