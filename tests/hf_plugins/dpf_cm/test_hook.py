"""Token rows and pooled states."""

import pytest
import torch

from hf_plugins.dpf_cm.hook import StateReader, answer_ids, content_mask, left_pad, prompt_ids
from hf_plugins.dpf_cm.keys import prefix_means
from tests.hf_plugins.dpf_cm.memorised import PRIVATE, model, tokenizer


def test_padding_does_not_move_a_state() -> None:
    """Left padding in generate, right padding in the reader, none at all: the same key within 1e-4."""
    reader = StateReader(model(), tokenizer())
    rows = [prompt_ids(tokenizer(), p) for p in ("短", PRIVATE[0].prompt)]
    together = reader.means(rows, [[len(r)] for r in rows])
    alone = [reader.means([r], [[len(r)]])[0] for r in rows]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    ids, mask = left_pad(rows, tokenizer(), "cpu")
    kept: list[torch.Tensor] = []
    with reader.tapped(kept.append), torch.no_grad():
        model().generate(input_ids=ids, attention_mask=mask, max_new_tokens=1, do_sample=False)
    content = mask * content_mask(ids, reader.special)
    left = prefix_means(kept[0], content, torch.tensor([[ids.shape[1]]] * 2))
    for i in range(2):
        torch.testing.assert_close(left[i], alone[i], atol=1e-4, rtol=0)


def test_state_is_that_of_the_layer_and_causal() -> None:
    reader = StateReader(model(), tokenizer(), layer=0)
    ids = torch.tensor(
        [prompt_ids(tokenizer(), PRIVATE[0].prompt) + answer_ids(tokenizer(), PRIVATE[0].answer)]
    )
    with torch.no_grad():
        states = model()(input_ids=ids, output_hidden_states=True).hidden_states[1][0]
    keep = content_mask(ids, reader.special)[0].bool()
    short = len(prompt_ids(tokenizer(), PRIVATE[0].prompt))
    found = reader.means(ids.tolist(), [[short, ids.shape[1]]])[0]
    torch.testing.assert_close(found[1], states[keep].mean(0), atol=1e-5, rtol=1e-4)
    # The prefix inside the whole text has the state of the prefix alone.
    alone = reader.means([ids[0, :short].tolist()], [[short]])[0]
    torch.testing.assert_close(found[0], alone[0], atol=1e-5, rtol=1e-4)


def test_layer_must_exist() -> None:
    with pytest.raises(ValueError, match=r"layer must lie in \[0, .*1\]; got 5. This model has 2 layers"):
        StateReader(model(), tokenizer(), 5)


def test_reader_leaves_the_model_as_it_was() -> None:
    net = model()
    net.train()
    try:
        hooks = [len(m._forward_hooks) for m in net.modules()]
        StateReader(net, tokenizer()).means([[5, 6]], [[2]])
        assert net.training
        assert [len(m._forward_hooks) for m in net.modules()] == hooks
    finally:
        net.eval()
