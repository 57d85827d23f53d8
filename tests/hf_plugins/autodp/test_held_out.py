import math

import torch

from hf_plugins.autodp.held_out import IGNORED, row_losses


def test_by_hand() -> None:
    """Uniform logits over 4 tokens: log 4 for each labelled token; a certain right token: 0; no label:
    NaN.
    """
    logits = torch.zeros(3, 3, 4)
    logits[1, 0, 2] = 1e4
    labels = torch.tensor([[IGNORED, 1, 3], [IGNORED, 2, IGNORED], [0, IGNORED, IGNORED]])
    losses = row_losses(logits, labels)
    assert losses[0].item() == torch.tensor(math.log(4)).item()
    assert losses[1].item() == 0
    assert math.isnan(losses[2].item())


def test_each_token_is_predicted_from_the_one_before() -> None:
    """Position 0 says token 1 and position 1 says token 0: right for the labels 1, 0; wrong if shifted."""
    logits = torch.full((1, 3, 2), -50.0)
    logits[0, 0, 1] = logits[0, 1, 0] = 50
    assert row_losses(logits, torch.tensor([[IGNORED, 1, 0]])).item() < 1e-6
    assert row_losses(logits, torch.tensor([[IGNORED, 0, 1]])).item() > 50


def test_half_precision_is_computed_in_fp32() -> None:
    logits = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(row_losses(logits.bfloat16(), labels), row_losses(logits, labels), atol=0.03)
