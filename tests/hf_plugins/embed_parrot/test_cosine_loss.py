"""The parrot's losses against hand values, loops and autograd."""

import pytest
import torch

from hf_plugins.embed_parrot import cosine_loss as module
from hf_plugins.embed_parrot.cosine_loss import cosine_cross_entropy, cosine_loss
from hf_plugins.embed_parrot.matching import unit_rows
from tests.hf_plugins.embed_parrot import reference


@pytest.mark.parametrize("scale", [1e-3, 1.0, 250.0])
def test_zero_for_any_positive_multiple(scale: float) -> None:
    target = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    assert cosine_loss(scale * target, target).abs() < 1e-6


def test_one_when_orthogonal_and_two_when_opposite() -> None:
    axes = torch.eye(4)
    torch.testing.assert_close(cosine_loss(axes, axes.roll(1, 0)), torch.tensor(1.0))
    torch.testing.assert_close(cosine_loss(-axes, axes), torch.tensor(2.0))


def test_agrees_with_loops() -> None:
    a, b = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(1))
    assert float(cosine_loss(a, b)) == pytest.approx(reference.cosine_loss(a, b), abs=1e-6)


def test_no_gradient_into_the_target() -> None:
    target = torch.randn(3, 4, requires_grad=True)
    output = torch.randn(3, 4, requires_grad=True)
    cosine_loss(output, target).backward()
    assert target.grad is None
    assert output.grad.abs().sum() > 0


def test_cross_entropy_by_hand() -> None:
    """One token that equals row 0 of two orthogonal rows, tau = 2: logits (2, 0), loss log(1 + e^-2)."""
    loss = cosine_cross_entropy(torch.tensor([[3.0, 0.0]]), torch.eye(2), torch.tensor([0]), tau=2.0)
    torch.testing.assert_close(loss, torch.tensor(2.0).neg().exp().log1p())


@pytest.mark.parametrize("block", [1, 3 * 11, 10**6])
def test_cross_entropy_and_gradient_agree_with_autograd(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(module, "_BLOCK_SCORES", block)
    generator = torch.Generator().manual_seed(2)
    table, output = torch.randn(11, 6, generator=generator), torch.randn(8, 6, generator=generator)
    labels = torch.randint(0, 11, (8,), generator=generator)
    mine = output.clone().requires_grad_()
    loss = cosine_cross_entropy(mine, unit_rows(table), labels, tau=5.0)
    (3 * loss).backward()
    theirs = output.double().requires_grad_()
    expected = reference.cosine_cross_entropy(theirs, table.double(), labels.tolist(), 5.0)
    (3 * expected).backward()
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=1e-6, rtol=1e-5)


def test_cross_entropy_does_not_see_lengths() -> None:
    table, output = unit_rows(torch.randn(11, 6)), torch.randn(8, 6)
    labels = torch.arange(8)
    torch.testing.assert_close(
        cosine_cross_entropy(output, table, labels, tau=9.0),
        cosine_cross_entropy(7 * output, table, labels, tau=9.0),
    )
