"""What the model makes of a text before it answers: token rows, and pooled hidden states of one layer."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_plugins.decoder_layers import find_decoder_layers
from hf_plugins.dpf_cm.keys import prefix_means


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Tokens of a question as the model is asked: through the chat template if there is one."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt)["input_ids"]
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def answer_ids(tokenizer: Any, answer: str) -> list[int]:
    """Tokens of an answer."""
    return tokenizer(answer, add_special_tokens=False)["input_ids"]


def left_pad(rows: Sequence[Sequence[int]], tokenizer: Any, device: Any) -> tuple[Tensor, Tensor]:
    """Token rows as one batch (B, T) with its attention mask, padded on the left as for ``generate``."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), tokenizer.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[place, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


def content_mask(ids_BT: Tensor, special: Tensor) -> Tensor:
    """1 where a token is no special token (padding and template marks are special)."""
    return (~torch.isin(ids_BT.cpu(), special)).long()


class _Stop(Exception):  # noqa: N818
    """Ends a forward pass behind the layer that was wanted."""


class StateReader:
    """Pooled hidden states of one layer.

    Args:
        model: A decoder-only language model; wrappers of PEFT and DDP are looked through.
        tokenizer: Its tokenizer.
        layer: Which layer's output; None is the middle one.
    """

    def __init__(self, model: Any, tokenizer: Any, layer: int | None = None) -> None:
        inner = getattr(model, "module", model)
        base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
        self.layers = find_decoder_layers(base).modules
        count = len(self.layers)
        self.layer = count // 2 if layer is None else layer
        if not 0 <= self.layer < count:
            raise ValueError(
                f"layer must lie in [0, {count - 1}]; got {layer}. This model has {count} layers."
            )
        self.model, self.base, self.tokenizer = model, base, tokenizer
        self.special = torch.tensor(sorted(tokenizer.all_special_ids), dtype=torch.long)
        self.width = base.config.get_text_config().hidden_size

    def fingerprint(self) -> str:
        """Hash of the weights that make the keys: a slice of every tensor up to the layer."""
        whole = hashlib.sha256(str(self.layer).encode())
        parts = [self.base.get_input_embeddings(), *self.layers[: self.layer + 1]]
        for part in parts:
            for name, tensor in sorted(part.state_dict().items()):
                whole.update(name.encode() + str(tuple(tensor.shape)).encode())
                whole.update(tensor.detach().flatten()[:4096].float().cpu().numpy().tobytes())
        return whole.hexdigest()[:32]

    @contextmanager
    def tapped(self, keep: Callable[[Tensor], None]) -> Iterator[None]:
        """Hand every output of the layer to ``keep`` while active."""

        def hook(module: Any, inputs: Any, output: Any) -> None:
            keep(output[0] if isinstance(output, tuple) else output)

        handle = self.layers[self.layer].register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def means(
        self, rows: Sequence[Sequence[int]], ends: Sequence[Sequence[int]], *, batch_size: int = 8
    ) -> list[Tensor]:
        """Means of prefixes of token rows; layers behind the wanted one do not run.

        Args:
            rows: Token ids, unpadded.
            ends: Prefix ends of each row.
            batch_size: Rows at once.

        Returns:
            For each row a tensor (number of its ends, H), fp32, on the CPU.
        """
        device = next(self.base.parameters()).device
        training, self_mode = self.base.training, self.base.eval()
        found: list[Tensor] = [torch.zeros(0)] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        kept: list[Tensor] = []

        def keep(hidden: Tensor) -> None:
            kept.append(hidden)
            raise _Stop

        try:
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                width, most = max(len(rows[i]) for i in batch), max(len(ends[i]) for i in batch)
                ids = torch.zeros(len(batch), width, dtype=torch.long)
                seen = torch.zeros_like(ids)
                stops = torch.zeros(len(batch), most, dtype=torch.long)
                for place, i in enumerate(batch):
                    ids[place, : len(rows[i])] = torch.tensor(rows[i], dtype=torch.long)
                    seen[place, : len(rows[i])] = 1
                    stops[place, : len(ends[i])] = torch.tensor(ends[i], dtype=torch.long)
                kept.clear()
                with self.tapped(keep):
                    try:
                        self_mode(input_ids=ids.to(device), attention_mask=seen.to(device), use_cache=False)
                    except _Stop:
                        pass
                mask = content_mask(ids, self.special) * seen
                means = prefix_means(kept[0], mask, stops).cpu()
                for place, i in enumerate(batch):
                    found[i] = means[place, : len(ends[i])]
        finally:
            self.base.train(training)
        return found
