"""Loss of a language model on held-out answers, row by row."""

# N rows, L tokens, V vocabulary.

import torch
from torch import Tensor

IGNORED = -100


def row_losses(logits_NLV: Tensor, labels_NL: Tensor) -> Tensor:
    """Mean negative log-likelihood of each row's labelled tokens, each predicted from the position before.

    Args:
        logits_NLV: Any float dtype; computed in fp32.
        labels_NL: int64 token ids, -100 where nothing is asked (the prompt, padding).

    Returns:
        (N,) fp32 in nats a token; NaN for a row without labelled tokens.
    """
    targets = labels_NL[:, 1:]
    loss = torch.nn.functional.cross_entropy(
        logits_NLV[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(targets.shape)
    return loss.sum(1) / (targets != IGNORED).sum(1)
