"""What methods must know of a transformer: find its stack of layers, drop some, bypass some.

Written for causal language models (``model.layers``, ``transformer.h``) and for encoders such as BERT
(``encoder.layer``). Encoder-decoder models and models whose config describes layers by a formula of their
position are refused, because dropping a layer would silently change the others.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

# Lists with one entry a layer (transformers 5.23); entries of dropped layers go.
PER_LAYER_LISTS = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "no_rope_layers",
    "layer_rope_theta",
    "per_layer_config",
    "num_attention_heads_per_layer",
    "num_key_value_heads_per_layer",
    "sliding_windows",
)
# Lists of layer numbers; survivors get their new numbers.
INDEX_LISTS = (
    "mlp_only_layers",
    "cross_attention_layers",
    "attn_layer_indices",
    "fullatt_block_indexes",
    "moe_layers",
    "local_layer_ids",
)
# "The first n layers are ..."; n becomes the number of survivors among them.
PREFIX_COUNTS = ("first_k_dense_replace", "num_dense_layers")
# Rules that compute a layer's kind from its number, with the values that switch the rule off, and the list
# whose presence makes the rule unused.
FORMULAS: dict[str, tuple[tuple[Any, ...], str | None]] = {
    "decoder_sparse_step": ((None, 0, 1), None),
    "attn_layer_period": ((None, 1), None),
    "attn_layer_offset": ((None, 0), None),
    "expert_layer_period": ((None, 1), None),
    "expert_layer_offset": ((None, 0), None),
    "interleave_moe_layer_step": ((None, 0, 1), "moe_layers"),
    "moe_layer_interval": ((None, 1), None),
    "moe_layer_start_index": ((None, 0), None),
    "sliding_window_pattern": ((None, 1), "layer_types"),
    "global_attn_every_n_layers": ((None, 0, 1), "layer_types"),
    "num_kv_shared_layers": ((None, 0), None),
    "num_nextn_predict_layers": ((None, 0), None),
    "num_mtp_layers": ((None, 0), None),
    "scale_attn_by_inverse_layer_idx": ((None, False), None),
    "layer_group_size": ((None, 1), None),
}


class DecoderLayers(NamedTuple):
    """The stack of equal layers of a model."""

    name: str
    """Dotted path of the list in the model, for example ``model.layers``."""
    modules: nn.ModuleList
    """The list itself."""
    config: PreTrainedConfig
    """The config that counts these layers; the text part of a multimodal one."""


def find_decoder_layers(model: PreTrainedModel) -> DecoderLayers:
    """Find the list of layers that the model's config counts.

    Args:
        model: A transformers model; for an adapter give ``peft_model.get_base_model()``.

    Returns:
        Path, list and config. In a multimodal model the text decoder's.

    Raises:
        ValueError: If the model is an encoder-decoder, or no list or several lists fit.
    """
    config = model.config.get_text_config()
    _refuse_encoder_decoder(model.config)
    count = config.num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(found) > 1:
        # The owner of the text layers holds the text config itself, a vision tower another one.
        owners = dict(model.named_modules())
        found = [
            (name, module)
            for name, module in found
            if vars(owners[name.rpartition(".")[0]]).get("config") is config
        ]
    if len(found) != 1:
        names = [name for name, _ in found]
        raise ValueError(
            f"{type(model).__name__} has {len(found)} lists of num_hidden_layers={count} modules {names}; "
            "exactly one is needed. Layers shared or nested in groups cannot be dropped one by one."
        )
    return DecoderLayers(*found[0], config)


def _refuse_encoder_decoder(config: PreTrainedConfig) -> None:
    if config.is_encoder_decoder:
        raise ValueError(
            f"{config.model_type} is an encoder-decoder: its two stacks share one count and the first "
            "block holds the position bias. Use a decoder-only or an encoder-only model."
        )


def check_droppable(config: PreTrainedConfig) -> None:
    """Refuse configs whose layers cannot be renumbered.

    Args:
        config: The (text) config that counts the layers.

    Raises:
        ValueError: If a layer's kind follows from its number by a formula, or a list with one entry a layer
            is unknown here.
    """
    _refuse_encoder_decoder(config)
    values = config.to_dict()
    rules = [
        f"{name}={values[name]!r}"
        for name, (off, replaced_by) in FORMULAS.items()
        if name in values and values[name] not in off and not (replaced_by and values.get(replaced_by))
    ]
    if rules:
        raise ValueError(
            f"{config.model_type} derives what a layer is from its number ({', '.join(rules)}), so "
            "dropping one would change the layers behind it. Write the kinds out as a list in the config, or "
            "leave the model whole."
        )
    known = (*PER_LAYER_LISTS, *INDEX_LISTS)
    strange = [
        name
        for name, value in values.items()
        if isinstance(value, list | tuple)
        and len(value) == config.num_hidden_layers
        and name not in known
        and re.search("layer|block", name)
    ]
    if strange:
        raise ValueError(
            f"the config has lists of one entry a layer that are not known here: {', '.join(strange)}. Add "
            "them to PER_LAYER_LISTS or INDEX_LISTS of hf_plugins/decoder_layers.py."
        )


def _checked_kept(dropped: Collection[int], num_layers: int) -> list[int]:
    wrong = sorted(index for index in dropped if not 0 <= index < num_layers)
    if wrong:
        raise ValueError(f"layers {wrong} do not exist; this model has 0 to {num_layers - 1}.")
    kept = [index for index in range(num_layers) if index not in set(dropped)]
    if not kept:
        raise ValueError(f"all {num_layers} layers would be dropped; keep at least one.")
    return kept


def shorten_config(config: PreTrainedConfig, dropped: Collection[int]) -> None:
    """Rewrite, in place, everything in a config that speaks of layers by number.

    Args:
        config: The (text) config that counts the layers.
        dropped: Layer numbers that go.

    Raises:
        ValueError: If a number does not exist, no layer is left, or `check_droppable` refuses.
    """
    check_droppable(config)
    kept = _checked_kept(dropped, config.num_hidden_layers)
    position = {old: new for new, old in enumerate(kept)}
    values = config.to_dict()
    # Lists before the number: the library's validation compares them.
    for name in PER_LAYER_LISTS:
        entries = values.get(name)
        if isinstance(entries, list | tuple):
            setattr(config, name, [entries[old] for old in kept])
        elif isinstance(entries, dict):
            moved = {str(position[int(old)]): value for old, value in entries.items() if int(old) in position}
            setattr(config, name, moved)
    for name in INDEX_LISTS:
        if isinstance(values.get(name), list | tuple):
            setattr(config, name, [position[old] for old in values[name] if old in position])
    for name in PREFIX_COUNTS:
        if isinstance(values.get(name), int):
            setattr(config, name, sum(old < values[name] for old in kept))
    config.num_hidden_layers = len(kept)


def renumber_layers(layers: Iterable[nn.Module]) -> None:
    """Give every submodule that knows its layer's number the number of its place in ``layers``.

    A stale number makes cached decoding read another layer's cache: silently wrong with SDPA.
    """
    for number, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(vars(module).get("layer_idx"), int):
                vars(module)["layer_idx"] = number


def drop_layers(model: PreTrainedModel, dropped: Collection[int]) -> None:
    """Remove layers of a model in memory; numbers and config are brought in line.

    Args:
        model: Changed in place. It then saves, reloads and generates as any other.
        dropped: Layer numbers that go.

    Raises:
        ValueError: If `find_decoder_layers` or `shorten_config` refuses.
    """
    name, layers, config = find_decoder_layers(model)
    shorten_config(config, dropped)
    kept = [layer for number, layer in enumerate(layers) if number not in set(dropped)]
    owner = model.get_submodule(name.rpartition(".")[0])
    setattr(owner, name.rpartition(".")[2], nn.ModuleList(kept))
    renumber_layers(kept)
    # A static cache and a device map of the long model do not fit the short one.
    for stale in ("_cache", "hf_device_map"):
        vars(model).pop(stale, None)
    # Forward runs layers[:num_hidden_layers], so a wrong number would hide layers without a word.
    assert len(kept) == config.num_hidden_layers, "layers and num_hidden_layers went apart"


def layer_prefix(keys: Iterable[str], name: str, num_layers: int) -> str:
    """The common start of layer tensors in a checkpoint, whose keys may lack or add a model's outer name.

    Args:
        keys: Tensor names of the checkpoint.
        name: Path of the layer list in the model, such as ``bert.encoder.layer``.
        num_layers: Layers the config counts.

    Returns:
        The prefix without its last dot, such as ``encoder.layer``.

    Raises:
        ValueError: If no prefix, or more than one, numbers exactly ``num_layers`` layers and fits the name.
    """
    numbers: dict[str, set[int]] = {}
    for key in keys:
        for match in re.finditer(r"\.(\d+)\.", f".{key}"):
            numbers.setdefault(key[: max(match.start() - 1, 0)], set()).add(int(match.group(1)))
    same_tail = [
        prefix for prefix in numbers if f".{name}".endswith(f".{prefix}") or f".{prefix}".endswith(f".{name}")
    ]
    fitting = [prefix for prefix in same_tail if numbers[prefix] == set(range(num_layers))]
    if len(fitting) != 1:
        seen = {prefix: f"{len(numbers[prefix])} layers" for prefix in same_tail}
        raise ValueError(
            f"the checkpoint must number the layers of {name!r} from 0 to {num_layers - 1} under one name; "
            f"found {seen or 'none'}. Config and weights do not belong together, or the key names are "
            "foreign."
        )
    return fitting[0]


def _hidden_state(arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    return arguments[0] if arguments else options["hidden_states"]


@contextmanager
def bypass_layers(model: PreTrainedModel, numbers: Collection[int]) -> Iterator[None]:
    """While active, the named layers hand their input on unchanged; nothing in the model is modified.

    The layers still run (and fill caches); only their result is put aside, which works for every layout.

    Args:
        model: A transformers model.
        numbers: Layers to bypass.

    Raises:
        ValueError: If a number does not exist.
    """
    layers = find_decoder_layers(model).modules
    wrong = sorted(number for number in numbers if not 0 <= number < len(layers))
    if wrong:
        raise ValueError(
            f"layers {wrong} cannot be bypassed: they do not exist; this model has 0 to {len(layers) - 1}."
        )

    def identity(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> Any:
        hidden = _hidden_state(arguments, options)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handles = [layers[number].register_forward_hook(identity, with_kwargs=True) for number in numbers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watch_layers(model: PreTrainedModel, report: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """While active, every layer reports the hidden states that enter and leave it.

    Args:
        model: A transformers model.
        report: Called without gradients as ``report(number, entered, left)``, both (N, T, D).
    """

    def hook(number: int) -> Callable[..., None]:
        def run(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
            with torch.no_grad():
                left = output[0] if isinstance(output, tuple) else output
                report(number, _hidden_state(arguments, options), left)

        return run

    layers = find_decoder_layers(model).modules
    handles = [
        layer.register_forward_hook(hook(number), with_kwargs=True) for number, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
