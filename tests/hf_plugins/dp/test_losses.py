"""Losses by record against position-by-position sums; no record sees another."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_plugins.dp.losses import classification_losses, span_losses, token_losses
from tests.hf_plugins.dp import reference


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(2, 6), st.integers(2, 5), st.booleans(), st.integers(0, 99))
def test_token_losses_equal_the_loop(batch: int, length: int, words: int, shift: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, length, words, generator=generator)
    labels = torch.randint(0, words, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) < 0.4] = -100
    ours = token_losses(logits, labels, shift=shift)
    expected = [reference.token_loss(x, y, shift=shift) for x, y in zip(logits, labels, strict=True)]
    torch.testing.assert_close(ours, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_token_mean_is_the_records_own() -> None:
    """A record's loss and gradient do not change with its neighbour's length; a mean over the batch's do."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator, requires_grad=True)
    long = torch.randint(0, 7, (2, 5), generator=generator)
    short = long.clone()
    short[1, 2:] = -100
    (first,) = torch.autograd.grad(token_losses(logits, long, shift=True)[0], logits)
    (second,) = torch.autograd.grad(token_losses(logits, short, shift=True)[0], logits)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert second[1].abs().sum() == 0
    batch_mean = F.cross_entropy(logits[:, :-1].flatten(0, 1), short[:, 1:].flatten())
    (mixed,) = torch.autograd.grad(batch_mean, logits)
    assert (mixed[0] - first[0] / 2).abs().max() > 1e-3


@pytest.mark.parametrize(
    "problem", ["single_label_classification", "multi_label_classification", "regression"]
)
def test_mean_of_losses_is_the_hosts_batch_loss(problem: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 3, generator=generator)
    if problem == "single_label_classification":
        labels = torch.randint(0, 3, (6,), generator=generator)
        host = F.cross_entropy(logits, labels)
    elif problem == "regression":
        labels = torch.randn(6, 3, generator=generator)
        host = F.mse_loss(logits, labels)
    else:
        labels = (torch.rand(6, 3, generator=generator) < 0.5).float()
        host = F.binary_cross_entropy_with_logits(logits, labels)
    losses = classification_losses(logits, labels, problem=problem)
    assert losses.shape == (6,)
    torch.testing.assert_close(losses.mean(), host)


def test_single_number_regression_takes_a_flat_target() -> None:
    """(2 - 5)^2 = 9."""
    losses = classification_losses(torch.tensor([[2.0]]), torch.tensor([5.0]), problem="regression")
    assert losses.tolist() == [9.0]


def test_answer_beyond_the_text_does_not_count() -> None:
    """Uniform scores over 4 positions cost ln 4 for each end that lies in the text."""
    flat = torch.zeros(2, 4)
    losses = span_losses(flat, flat, torch.tensor([1, 9]), torch.tensor([2, 3]))
    ln4 = torch.log(torch.tensor(4.0))
    torch.testing.assert_close(losses, torch.stack([ln4, ln4 / 2]))
