"""Gradients of each record equal a loop over records; models that cannot have them are refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_plugins.dp.loss import model_losses
from hf_plugins.dp.model import (
    RecordGradients,
    attach,
    check_model,
    mixing_layers,
    self_check_error,
    trainable,
    why_not_ghost,
)
from tests.hf_plugins.dp import reference, tiny

ATTENTION = ["q_proj", "v_proj"]
MODELS = {
    "bert": (tiny.bert, tiny.classified),
    "llama": (tiny.llama, tiny.written),
    "llama-tied": (lambda: tiny.llama(tied=True), tiny.written),
    "gpt2": (tiny.gpt2, tiny.written),
    "llama-lora": (lambda: tiny.lora(tiny.llama(), ATTENTION), tiny.written),
    "bert-lora": (lambda: tiny.lora(tiny.bert(), ["query", "dense"]), tiny.classified),
}
CASES = [(name, mode) for name in MODELS for mode in ("hooks", "ghost")]


def _one(inputs: dict[str, Any], number: int) -> dict[str, Any]:
    return {key: value[number : number + 1] for key, value in inputs.items()}


def _run(model: nn.Module, mode: str, inputs: dict[str, Any], count: int, bound: float) -> list[Tensor]:
    gradients = attach(model, mode=mode, max_grad_norm=bound, ghost_fault=None)
    gradients.start(count)
    done = gradients.backward(model_losses(model, dict(inputs)), torch.arange(count), count)
    gradients.detach()
    zeros = [torch.zeros_like(p) for p in gradients.parameters]
    return [z if c is None else c for z, c in zip(zeros, done.contributions, strict=True)]


@pytest.mark.parametrize(("name", "mode"), CASES)
@pytest.mark.parametrize("bound", [1e6, 0.05])
def test_clipped_sum_equals_a_loop_over_records(name: str, mode: str, bound: float) -> None:
    """Positions, tied weights, adapters, padding; float32 against a float64 sum of float32 gradients."""
    make, rows = MODELS[name]
    model, inputs = make(), tiny.batch(rows(), 5)
    model.train()
    expected = reference.loop_clipped_sum(
        model, lambda i: model_losses(model, _one(inputs, i)).sum(), 5, bound
    )
    found = _run(model, mode, inputs, 5, bound)
    size = max(float(e.norm()) for e in expected)
    for ours, theirs in zip(found, expected, strict=True):
        # 1e-5 of the clip factor is the guard against rounding, and comes on top.
        torch.testing.assert_close(ours.double(), theirs, rtol=5e-5, atol=3e-5 * size)


def test_hooks_leave_nothing_behind() -> None:
    model, inputs = tiny.bert(), tiny.batch(tiny.classified(), 3)
    before = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
    _run(model.train(), "hooks", inputs, 3, 1.0)
    after = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
    assert after == before
    assert not [p for p in model.parameters() if {"grad_sample", "_norm_sample"} & set(p.__dict__)]
    assert all(p.grad is None for p in model.parameters())


def test_users_gradient_is_the_clipped_mean_of_their_records() -> None:
    """Records 0 and 2 belong to one user, 1 to another: two losses, each a mean, are clipped."""
    model, inputs = tiny.bert().train(), tiny.batch(tiny.classified(), 3)
    owners = [[0, 2], [1]]

    def loss(user: int) -> Tensor:
        return torch.stack([model_losses(model, _one(inputs, i)).sum() for i in owners[user]]).mean()

    expected = reference.loop_clipped_sum(model, loss, 2, 0.05)
    gradients = RecordGradients(model, ghost=False, max_grad_norm=0.05)
    gradients.start(3)
    done = gradients.backward(model_losses(model, inputs), torch.tensor([0, 1, 0]), 2)
    assert done.norms.shape == (2,)
    for ours, theirs in zip(done.contributions, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=5e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("name", MODELS)
def test_short_cut_gives_the_same_and_leaves_weights_gradients_out(name: str, mode: str) -> None:
    """Ending at the first layers changes no result, and no other weight got a gradient on the way."""
    make, rows = MODELS[name]
    model, inputs = make().train(), tiny.batch(rows(), 4)
    gradients = attach(model, mode=mode, max_grad_norm=0.1, ghost_fault=None)
    found, touched = [], []
    for parameter in gradients.parameters:
        parameter.register_post_accumulate_grad_hook(lambda p: touched.append(p))
    for thorough in (True, False):
        touched.clear()
        gradients.start(4)
        done = gradients.backward(model_losses(model, dict(inputs)), torch.arange(4), 4, thorough=thorough)
        found.append(done.contributions)
        assert (len(touched) == len(gradients.parameters)) is thorough
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


class _FourAxes(nn.Module):
    """A linear layer on [B, 2, 3, I], and a table whose row 0 is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4, padding_idx=0)
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.table(x)).square().sum((1, 2, 3))


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_linear_layer_on_four_axes_and_padding_row(mode: str) -> None:
    torch.manual_seed(0)
    model = _FourAxes()
    x = torch.randint(0, 9, (4, 2, 3))
    x[:, 0, 0] = 0
    expected = reference.loop_clipped_sum(model, lambda i: model(x[i : i + 1]).sum(), 4, 0.3)
    gradients = RecordGradients(model, ghost=mode == "ghost", max_grad_norm=0.3)
    gradients.start(4)
    done = gradients.backward(model(x), torch.arange(4), 4)
    for ours, theirs in zip(done.contributions, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)
    assert done.contributions[0][0].abs().sum() == 0


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("layer", ["plain", "bias", "depthwise", "pointwise", "strided"])
def test_convolution_in_either_memory_format(mode: str, layer: str) -> None:
    """Opacus 1.6 itself is wrong by more than the gradient's size for channels_last inputs."""
    torch.manual_seed(0)
    options = {
        "plain": {"kernel_size": 3, "padding": 1, "bias": False},
        "bias": {"kernel_size": 3},
        "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4, "bias": False},
        "pointwise": {"kernel_size": 1, "bias": False},
        "strided": {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False},
    }[layer]
    model = nn.Sequential(nn.Conv2d(4, 4, **options), nn.Tanh(), nn.Flatten())
    for memory in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(3, 4, 6, 5).contiguous(memory_format=memory)
        expected = reference.loop_clipped_sum(
            model, lambda i, x=x: model(x[i : i + 1]).square().sum(), 3, 0.5
        )
        gradients = RecordGradients(model, ghost=mode == "ghost", max_grad_norm=0.5)
        gradients.start(3)
        done = gradients.backward(model(x).square().sum(1), torch.arange(3), 3)
        gradients.detach()
        for ours, theirs in zip(done.contributions, expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)


class _TwoPaths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
        self.both = True

    def forward(self, x: Tensor) -> Tensor:
        out = self.first(x)
        return (out + self.second(x) if self.both else out)[:, 0]


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_norm_of_a_layer_that_is_skipped_does_not_come_from_the_chunk_before(mode: str) -> None:
    """x = (3, 4) has norm 5 in each layer: sqrt(50) with both, 5 with the first alone."""
    model, x = _TwoPaths(), torch.tensor([[3.0, 4.0]])
    gradients = RecordGradients(model, ghost=mode == "ghost", max_grad_norm=1e6)
    for both, norm in ((True, 50**0.5), (False, 5.0)):
        model.both = both
        gradients.start(1)
        done = gradients.backward(model(x), torch.arange(1), 1)
        assert float(done.norms) == pytest.approx(norm, rel=1e-6)
        assert (done.contributions[1] is None) is not both


class _Outside(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.borrowed = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return (self.used(x) @ self.borrowed.weight).sum(1)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_gradient_that_hooks_do_not_see_is_refused(mode: str) -> None:
    model = _Outside()
    gradients = RecordGradients(model, ghost=mode == "ghost", max_grad_norm=1.0)
    gradients.start(2)
    with pytest.raises(RuntimeError, match=r"are not known record by record: .*borrowed\.weight"):
        gradients.backward(model(torch.ones(2, 2)), torch.arange(2), 2, thorough=True)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_record_that_overflows_takes_no_part(mode: str, value: float) -> None:
    """The other record's gradient, (1, 0) for the weight and 1 for the bias, is all there is."""
    layer = nn.Linear(2, 1)
    x = torch.tensor([[1.0, 0.0], [value, 0.0]])
    gradients = RecordGradients(layer, ghost=mode == "ghost", max_grad_norm=10.0)
    gradients.start(2)
    done = gradients.backward(layer(x)[:, 0], torch.arange(2), 2)
    assert done.contributions[0].tolist() == [[1.0, 0.0]]
    assert done.contributions[1].tolist() == [1.0]


class _Twice(nn.Module):
    """Calls one layer twice: the norm of the sum is not made of the norms of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh()).square().sum(1)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_layer_called_twice(mode: str) -> None:
    torch.manual_seed(0)
    model, x = _Twice(), torch.randn(4, 3)
    expected = reference.loop_clipped_sum(model, lambda i: model(x[i : i + 1]).sum(), 4, 0.2)
    gradients = RecordGradients(model, ghost=mode == "ghost", max_grad_norm=0.2)
    gradients.start(4)
    done = gradients.backward(model(x), torch.arange(4), 4)
    for ours, theirs in zip(done.contributions, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_half_precision_is_clipped_as_exactly_as_single(mode: str) -> None:
    """Under bf16 the gradients are coarse, but what is summed is what was measured: the bound holds."""
    model, inputs = tiny.bert().train(), tiny.batch(tiny.classified(), 1)
    gradients = RecordGradients(model, ghost=mode == "ghost", max_grad_norm=0.01)
    gradients.start(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model_losses(model, inputs)
    done = gradients.backward(losses, torch.arange(1), 1)
    size = sum(float(c.double().square().sum()) for c in done.contributions if c is not None) ** 0.5
    assert 0.01 * (1 - 1e-4) < size <= 0.01


@pytest.mark.parametrize("frozen", [False, True])
def test_layers_that_mix_records_are_refused(frozen: bool) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.InstanceNorm2d(2), nn.GroupNorm(1, 2))
    model[1].requires_grad_(not frozen)
    assert mixing_layers(model) == ["1 (BatchNorm2d)"]
    with pytest.raises(ValueError, match=r"these layers mix the records of a batch: 1 .BatchNorm2d"):
        check_model(model)
    assert mixing_layers(nn.InstanceNorm2d(2, track_running_stats=True)) == [" (InstanceNorm2d)"]


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter of the model is trainable"):
        check_model(nn.Linear(2, 2).requires_grad_(False))


def test_ghost_is_refused_or_left_where_it_is_not_exact(caplog: pytest.LogCaptureFixture) -> None:
    assert why_not_ghost(tf32=False, by_user=False) is None
    assert "TF32" in why_not_ghost(tf32=True, by_user=False)
    assert "user" in why_not_ghost(tf32=False, by_user=True)
    with pytest.raises(ValueError, match="Use 'hooks', or 'auto', which chooses"):
        attach(tiny.llama(), mode="ghost", max_grad_norm=1.0, ghost_fault="TF32 rounds")
    with caplog.at_level("INFO"):
        attach(tiny.llama(), mode="auto", max_grad_norm=1.0, ghost_fault="why").detach()
        attach(tiny.llama(), mode="auto", max_grad_norm=1.0, ghost_fault=None).detach()
    assert "by hooks (why)" in caplog.text
    assert "by ghost clipping" in caplog.text


class _Mixing(nn.Module):
    """Subtracts the mean of the batch: every record sees the others."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, mix: float) -> Tensor:
        out = self.linear(self.dropout(x))
        return (out - mix * out.mean(0)).square().sum(1)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_self_check_sees_mixing_and_not_dropout(mode: str) -> None:
    torch.manual_seed(0)
    model = _Mixing().train()
    inputs = {"x": torch.randn(3, 3)}
    gradients = RecordGradients(model, ghost=mode == "ghost", max_grad_norm=0.5)
    clean, alone = self_check_error(gradients, lambda b: model(b["x"], 0.0), inputs, 3, 0.5)
    assert clean < 1e-5
    torch.testing.assert_close(torch.tensor(alone), model.linear(inputs["x"]).square().sum(1).detach())
    mixed, _ = self_check_error(gradients, lambda b: model(b["x"], 0.2), inputs, 3, 0.5)
    assert mixed > 0.05


def test_trainable_counts_a_shared_parameter_once() -> None:
    names = list(trainable(tiny.llama(tied=True)))
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
