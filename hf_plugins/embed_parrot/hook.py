"""Hooks on a transformer: read the hidden states of one layer and stop there, defend them, or continue a
prefix by many tokens at once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hf_plugins.embed_parrot.defences import Defence


class _ReachedError(Exception):
    """Ends a forward pass once the wanted states are known; never leaves this file."""


def base_config(model: nn.Module) -> Any:
    """The config that holds the number of layers; of a multi-modal model, that of its text part."""
    return model.config.get_text_config()


def transformer_layers(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The stack that owns the layers, and the layers, found by structure: PEFT and quantisation wrap inner
    modules and leave this list as it is.

    Args:
        model: A transformer of transformers, wrapped or not.

    Returns:
        The owner, whose output is after the final norm, and its ``ModuleList``.

    Raises:
        ValueError: If it is an encoder-decoder, or no list of layers has the length that the config names.
    """
    config = base_config(model)
    if config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder; the attacks need one stack of layers. Pass its "
            "encoder alone, for example model.get_encoder()."
        )
    count = config.num_hidden_layers
    found = [
        (owner, child)
        for owner in model.modules()
        for child in owner.children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    if not found:
        lengths = sorted({len(m) for m in model.modules() if isinstance(m, nn.ModuleList)})
        raise ValueError(
            f"no list of {count} layers in {type(model).__name__} (its lists have lengths {lengths}); only "
            "models whose layers stand in one ModuleList of config.num_hidden_layers can be tapped."
        )
    # A mixture of experts may hold lists of the same length inside a layer; the stack is the largest.
    return max(found, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))


def embedding_table(model: nn.Module) -> Tensor:
    """Input embeddings (V, D), fp32, detached."""
    return model.get_input_embeddings().weight.detach().float()


def head_table(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Output head (V, D) and its bias (V,); the input embeddings where a model has no head.

    The head is read by running it on unit vectors, so a quantised or LoRA-wrapped one works alike.
    """
    head = model.get_output_embeddings()
    table = embedding_table(model)
    if head is None:
        return table, None
    dtype = next((p.dtype for p in head.parameters()), torch.float32)
    eye = torch.eye(base_config(model).hidden_size, dtype=dtype, device=table.device)
    with torch.no_grad():
        bias = head(torch.zeros_like(eye[:1])).float()[0]
        return (head(eye).float() - bias).T.contiguous(), bias if bias.any() else None


def final_norm(model: nn.Module) -> nn.Module | None:
    """The normalisation between the last layer and the head; None for post-norm models such as BERT."""
    owner, layers = transformer_layers(model)
    children = list(owner.children())
    after = children[next(i for i, child in enumerate(children) if child is layers) + 1 :]
    return next((child for child in after if "norm" in type(child).__name__.lower()), None)


def is_causal(model: nn.Module) -> bool:
    """Whether a position sees only earlier ones, tested on the model itself."""
    layer = base_config(model).num_hidden_layers
    if layer == 0:
        return True
    with HiddenTap(model, layer) as tap:
        ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=embedding_table(model).device)
        first, second = tap(ids)[:, :3]
    return torch.allclose(first, second, atol=1e-5, rtol=1e-4)


def check_batch(ids: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Refuse batches whose hidden states would mean nothing.

    Raises:
        ValueError: If the batch is empty, or padded on the left without position ids.
    """
    if ids.numel() == 0:
        raise ValueError(
            f"the batch is empty (shape {tuple(ids.shape)}); give at least one text of one token."
        )
    if (
        mask is not None
        and mask.dim() == 2
        and bool((mask[:, 0] == 0).any())
        and "position_ids" not in kwargs
    ):
        raise ValueError(
            "the batch is padded on the left, so positions would count padding; pad on the right "
            "(tokenizer.padding_side='right') or pass position_ids."
        )


class HiddenTap:
    """Reads ``H_i`` of a frozen model and runs nothing behind it: ``with HiddenTap(model, 8) as tap: h =
    tap(ids)``.

    ``H_0`` is the input of the first layer, ``H_i`` the output of layer i. The model is in eval mode and
    without gradients while the tap is open, and as it was afterwards, whatever happens in between.

    Args:
        model: Causal LM or encoder, also PEFT-wrapped or quantised.
        layer: i, 0 .. number of layers.
        raw: For the last layer: its own output (True), or what follows the final norm and is called
            ``last_hidden_state`` (False).

    Raises:
        ValueError: If the layer is out of range.
    """

    def __init__(self, model: PreTrainedModel | nn.Module, layer: int, *, raw: bool = True) -> None:
        self.owner, self.layers = transformer_layers(model)
        if not 0 <= layer <= len(self.layers):
            raise ValueError(
                f"layer must lie in 0 .. {len(self.layers)} (0 is the embedding output); got {layer}."
            )
        self.model, self.layer, self.raw = model, layer, raw
        self._handles: list[Any] = []
        self._was_training: dict[nn.Module, bool] = {}
        self._hidden: Tensor | None = None

    def __enter__(self) -> "HiddenTap":
        """Put the hook in and the model to rest."""
        self._was_training = {module: module.training for module in self.model.modules()}
        self.model.eval()
        if self.layer < len(self.layers):
            hook = self.layers[self.layer].register_forward_pre_hook(self._before, with_kwargs=True)
        else:
            hook = (self.layers[-1] if self.raw else self.owner).register_forward_hook(self._after)
        self._handles.append(hook)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the hook out and give every module its training flag back."""
        while self._handles:
            self._handles.pop().remove()
        for module, training in self._was_training.items():
            module.training = training

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._stop(args[0] if args else kwargs["hidden_states"])

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        # A layer gives a tensor or a tuple that starts with it, the stack an output object.
        self._stop(output if isinstance(output, Tensor) else output[0])

    def _stop(self, hidden: Tensor) -> None:
        self._hidden = hidden.detach()
        raise _ReachedError

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Hidden states (batch, positions, width) of token ids (batch, positions).

        Args:
            input_ids: Token ids.
            attention_mask: 1 for tokens, 0 for padding on the right; or a 4D mask, taken as it is.
            kwargs: Passed to the model, for example ``position_ids`` or ``past_key_values``.

        Raises:
            RuntimeError: If the tap is not open.
        """
        if not self._handles:
            raise RuntimeError("the tap is closed; use it inside `with HiddenTap(model, layer) as tap:`.")
        check_batch(input_ids, attention_mask, kwargs)
        try:
            self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        except _ReachedError:
            pass
        hidden, self._hidden = self._hidden, None
        assert hidden is not None, "the forward pass ended without passing the tapped layer"
        return hidden


@contextmanager
def defended(model: nn.Module, defence: Defence, layer: int, generator: torch.Generator) -> Iterator[None]:
    """The model with a defence at work, on the embedding output or on the states that layer ``layer`` hands
    on.

    Args:
        model: The model.
        defence: What is done to the vectors.
        layer: The cut; not looked at by a defence of the embeddings.
        generator: Source of its randomness.

    Yields:
        Nothing; the hook is gone afterwards, whatever happened.
    """
    _, layers = transformer_layers(model)

    def on_output(module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, Tensor):
            return defence(output, generator)
        return (defence(output[0], generator), *output[1:])

    def on_input(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (defence(args[0], generator), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": defence(kwargs["hidden_states"], generator)}

    if defence.site == "embedding":
        handle = model.get_input_embeddings().register_forward_hook(on_output)
    elif layer < len(layers):
        handle = layers[layer].register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        handle = layers[-1].register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()


class CachedPrefix:
    """Recovered prefixes of several texts in the attacker's copy of a causal model.

    All candidates of a text run as one row: they stand behind the shared key/value cache, all at the same
    position, under a mask that lets each see the prefix and itself. The cache is never copied per candidate.

    Args:
        tap: An open tap on the attacked layer.
        num_texts: Texts recovered side by side.
    """

    def __init__(self, tap: HiddenTap, num_texts: int) -> None:
        self.tap, self.num_texts = tap, num_texts
        self.dtype = next(p.dtype for p in tap.model.parameters() if p.is_floating_point())
        self.length = 0
        # Keys and values of each layer behind the tap stay empty: those layers do not run.
        self.cache = DynamicCache()

    def _forward(self, cache: DynamicCache, tokens: Tensor) -> Tensor:
        rows, width = tokens.shape
        floor = torch.finfo(self.dtype).min
        own = torch.full((width, width), floor, dtype=self.dtype).fill_diagonal_(0)
        mask = torch.cat([torch.zeros(width, self.length, dtype=self.dtype), own], 1)
        device = self.tap.model.get_input_embeddings().weight.device
        positions = torch.full((rows, width), self.length, device=device)
        return self.tap(
            tokens.to(device),
            attention_mask=mask.to(device).expand(rows, 1, -1, -1),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).cpu()

    def probe(self, rows: Tensor, candidates: Tensor) -> Tensor:
        """Hidden states (texts, candidates, width) of each candidate behind the prefix of its text."""
        cache = self.cache
        if len(rows) < self.num_texts:
            cache = DynamicCache()
            for index, layer in enumerate(self.cache.layers):
                cache.update(layer.keys[rows], layer.values[rows], index)
        hidden = self._forward(cache, candidates)
        if cache is self.cache:
            self.cache.crop(-candidates.shape[1])
        return hidden

    def accept(self, tokens: Tensor) -> None:
        """Make each prefix one token longer."""
        self._forward(self.cache, tokens[:, None])
        self.length += 1


def collect_states(
    model: nn.Module,
    texts: Sequence[Tensor],
    layers: Sequence[int],
    *,
    raw: bool = True,
    batch_size: int = 16,
) -> dict[int, list[Tensor]]:
    """Hidden states of whole texts at several layers in one pass each batch, unpadded.

    Args:
        model: The model, already defended where a defence is wanted.
        texts: Token ids of each text, 1-D.
        layers: Which layers.
        raw: As in `HiddenTap`.
        batch_size: Texts run at once; texts of like length go together.

    Returns:
        For each layer the states of each text (positions, width), fp32, on the CPU.
    """
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    found: dict[int, list[Tensor]] = {layer: [torch.empty(0)] * len(texts) for layer in layers}
    device = model.get_input_embeddings().weight.device
    deepest = max(layers)
    seen: dict[int, Tensor] = {}
    _, modules = transformer_layers(model)

    def recorder(layer: int) -> Any:
        def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
            seen[layer] = (args[0] if args else kwargs["hidden_states"]).detach()

        return record

    handles = [
        modules[layer].register_forward_pre_hook(recorder(layer), with_kwargs=True)
        for layer in layers
        if layer < min(deepest, len(modules))
    ]
    try:
        with HiddenTap(model, deepest, raw=raw) as tap:
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                lengths = [len(texts[index]) for index in chosen]
                ids = nn.utils.rnn.pad_sequence([texts[index] for index in chosen], batch_first=True)
                mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
                seen[deepest] = tap(ids.to(device), mask.long().to(device))
                for layer in layers:
                    states = seen[layer].float().cpu()
                    for row, index in enumerate(chosen):
                        found[layer][index] = states[row, : lengths[row]].clone()
    finally:
        for handle in handles:
            handle.remove()
    return found
