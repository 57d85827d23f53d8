"""LoRA or a prefix on the layers behind the cut, and SPF beside it, through PEFT."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_plugins.tee_split.config import SPFConfig, TailConfig
from hf_plugins.tee_split.heads import head_rows, select_rows
from hf_plugins.tee_split.model import decoder_parts
from hf_plugins.tee_split.spf import SpfLinear
from hf_plugins.tee_split.split import SkippedLayer

SPF_CONFIG, SPF_WEIGHTS, PREFIX_WEIGHTS = "spf_config.json", "spf_model.safetensors", "prefix.safetensors"
SIMULATED = "SIMULATED - NO HARDWARE PROTECTION"

# Name of a projection inside of a layer -> how its rows lie; the first name that a layer has counts.
ATTENTION = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.qkv_proj": "concatenated",
    "attn.c_attn": "concatenated",
    "attention.query_key_value": "interleaved",
}
# First feed-forward matrices; the second value is how many matrices lie on top of one another.
FEED_FORWARD = {
    "mlp.gate_proj": 1,
    "mlp.up_proj": 1,
    "mlp.gate_up_proj": 2,
    "mlp.c_fc": 1,
    "mlp.fc1": 1,
    "mlp.dense_h_to_4h": 1,
}
OUTPUT_PROJECTIONS = ("self_attn.o_proj", "self_attn.dense", "attn.c_proj", "attention.dense")


class Projection(NamedTuple):
    """One matrix that SPF may touch."""

    name: str
    """Module name in the whole model."""
    layout: str
    """See `head_rows`; ``ffn`` for a feed-forward matrix."""
    stacked: int
    """Matrices on top of one another."""


def tail_layers(model: PreTrainedModel) -> range:
    """Numbers of the layers that are really there; all of them in a whole model."""
    layers = decoder_parts(model).layers
    first = sum(isinstance(layer, SkippedLayer) for layer in layers)
    return range(first, len(layers))


def projections(model: PreTrainedModel, layers: range, *, attention: bool, ffn: bool) -> list[Projection]:
    """Find the q, k, v and first feed-forward matrices of some layers.

    Args:
        model: A whole model or a server's half, with or without PEFT.
        layers: Layer numbers.
        attention: Whether to look for q, k and v.
        ffn: Whether to look for feed-forward matrices.

    Raises:
        NotImplementedError: If a layer has none of the known names.
    """
    prefix = decoder_parts(model).layers_prefix
    modules = dict(model.named_modules())
    found = []
    for number in layers:
        here = f"{prefix}.{number}"
        pairs = [(name, layout, 1) for name, layout in ATTENTION.items()] if attention else []
        mine = [Projection(f"{here}.{n}", layout, s) for n, layout, s in pairs if f"{here}.{n}" in modules]
        forward = [
            Projection(f"{here}.{name}", "ffn", stacked)
            for name, stacked in FEED_FORWARD.items()
            if ffn and f"{here}.{name}" in modules
        ]
        if (attention and not mine) or (ffn and not forward):
            missing = "attention" if attention and not mine else "feed-forward"
            raise NotImplementedError(
                f"SPF knows no {missing} matrix in {here}; it looks for {sorted(ATTENTION | FEED_FORWARD)}. "
                f"Turn {'attention' if missing == 'attention' else 'ffn'} off for this model."
            )
        found += mine + forward
    return found


def _linear(module: nn.Module) -> tuple[nn.Module, bool, int, int]:
    """The plain layer below LoRA, whether its weight is stored transposed, its inputs and outputs."""
    base = module.base_layer if isinstance(module, LoraLayer) else module
    transposed = isinstance(base, Conv1D)
    rows, columns = base.weight.shape
    return base, transposed, *((rows, columns) if transposed else (columns, rows))


def _rows(
    projection: Projection,
    weight: Tensor,
    model: PreTrainedModel,
    config: SPFConfig,
    generator: torch.Generator,
) -> Tensor:
    options = {"ratio": config.ratio, "select": config.select, "generator": generator}
    if projection.layout == "ffn":
        singles = torch.arange(weight.shape[0]).view(projection.stacked, -1, 1)
        return torch.cat([select_rows(weight, blocks, **options) for blocks in singles])
    text = model.config
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    blocks = head_rows(projection.layout, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    # q, k and v are ranked apart from one another.
    return torch.cat([select_rows(weight, rows, **options) for rows in blocks.values()]).sort().values


def apply_spf(model: PreTrainedModel | PeftModel, config: SPFConfig) -> dict[str, SpfLinear]:
    """Let chosen rows of the tail's frozen weights learn, in place.

    Args:
        model: A server's half or a whole model, after `get_peft_model` if PEFT is used.
        config: Options.

    Returns:
        The wrapped layers by module name of the whole model.

    Raises:
        NotImplementedError: If a layer has no matrix SPF knows.
        ValueError: If the ratio selects no row at all.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    generator = torch.Generator().manual_seed(config.spf_seed)
    wrapped: dict[str, SpfLinear] = {}
    if config.ratio == 0:
        return wrapped
    for projection in projections(inner, tail_layers(inner), attention=config.attention, ffn=config.ffn):
        module = inner.get_submodule(projection.name)
        base, transposed, _, _ = _linear(module)
        weight = base.weight.T if transposed else base.weight
        rows = _rows(projection, weight, inner, config, generator)
        if rows.numel():
            wrapped[projection.name] = _wrap(inner, projection.name, rows)
    if not wrapped:
        raise ValueError(
            f"ratio={config.ratio} selects no row of this model: int(ratio * heads) is 0 everywhere. Raise "
            "it, or set 0."
        )
    return wrapped


def _wrap(model: PreTrainedModel, name: str, rows: Tensor) -> SpfLinear:
    module = model.get_submodule(name)
    base, transposed, inputs, outputs = _linear(module)
    wrapper = SpfLinear(base, rows, in_features=inputs, out_features=outputs, transposed=transposed)
    if isinstance(module, LoraLayer):
        # Below LoRA, so that LoRA's parameters keep the names that PEFT saves.
        module.base_layer = wrapper
    else:
        model.set_submodule(name, wrapper)
    return wrapper


def spf_layers(model: PreTrainedModel | PeftModel) -> dict[str, SpfLinear]:
    """The wrapped layers of a model, by module name of the whole model."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return {
        name.removesuffix(".base_layer"): module
        for name, module in inner.named_modules()
        if isinstance(module, SpfLinear)
    }


def spf_tensors(model: PreTrainedModel | PeftModel) -> dict[str, Tensor]:
    """Differences and row numbers of all wrapped layers, by name."""
    out = {}
    for name, layer in spf_layers(model).items():
        out[f"{name}.spf_delta"] = layer.spf_delta.detach().cpu().contiguous()
        out[f"{name}.spf_rows"] = layer.spf_rows.cpu()
    return out


def save_spf(
    model: PreTrainedModel | PeftModel, folder: str | Path, config: SPFConfig, *, note: str = ""
) -> None:
    """Write ``spf_config.json`` and ``spf_model.safetensors``.

    Args:
        model: With `apply_spf` applied.
        folder: Where to write.
        config: Options that chose the rows.
        note: Kept beside the options; says so if the run was simulated.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(spf_tensors(model), folder / SPF_WEIGHTS)
    record = {"spf": vars(config), "note": note}
    (folder / SPF_CONFIG).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def load_spf(
    model: PreTrainedModel | PeftModel, folder: str | Path, *, merge: bool = False
) -> dict[str, SpfLinear]:
    """Put saved differences on a whole model or a half, by module name.

    Args:
        model: Plain, under PEFT, or already wrapped.
        folder: Written by `save_spf`.
        merge: Add them to the weights for good, so that the model is a plain one again.

    Returns:
        The wrapped layers; empty after a merge.

    Raises:
        KeyError: If the model lacks a layer that was saved.
        ValueError: If a difference has another shape than its rows and layer.
    """
    tensors = load_file(Path(folder) / SPF_WEIGHTS)
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = dict(inner.named_modules())
    existing = spf_layers(model)
    wrapped: dict[str, SpfLinear] = {}
    for key in sorted(tensors):
        name, kind = key.rsplit(".", 1)
        if kind != "spf_rows":
            continue
        if name not in modules:
            raise KeyError(
                f"the model has no layer {name!r} that {folder} was trained on; load the same base model"
            )
        layer = existing.get(name) or _wrap(inner, name, tensors[key])
        delta = tensors[f"{name}.spf_delta"]
        if layer.spf_delta.shape != delta.shape or not torch.equal(layer.spf_rows.cpu(), tensors[key]):
            raise ValueError(
                f"{name}: saved rows and shape {tuple(delta.shape)} differ from the model's "
                f"{tuple(layer.spf_delta.shape)}. Use the SPF options the difference was trained with."
            )
        with torch.no_grad():
            layer.spf_delta.copy_(delta)
        wrapped[name] = layer
    return merge_spf(model) if merge else wrapped


def merge_spf(model: PreTrainedModel | PeftModel) -> dict[str, SpfLinear]:
    """Add all differences to their weights and take the wrappers off.

    Returns:
        An empty dict: no wrapped layer is left.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, layer in spf_layers(model).items():
        base = layer.merge()
        module = inner.get_submodule(name)
        if isinstance(module, LoraLayer):
            module.base_layer = base
        else:
            inner.set_submodule(name, base)
    return {}


def attach_adapter(model: PreTrainedModel, config: TailConfig) -> PreTrainedModel | PeftModel:
    """Put PEFT on the tail.

    Args:
        model: A server's half.
        config: Which method, and its settings.

    Returns:
        The model under PEFT; ``model`` with all parameters frozen for ``adapter='none'``.

    Raises:
        ValueError: If target_modules match nothing.
    """
    layers = tail_layers(model)
    if config.adapter == "none":
        return model.requires_grad_(False)
    if config.adapter == "prefix":
        return get_peft_model(
            model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=config.num_virtual_tokens)
        )
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.target_modules or default_target(model),
        # The adapter then loads into the whole model without touching the client's layers.
        layers_to_transform=list(layers),
        layers_pattern=decoder_parts(model).layers_prefix.rsplit(".", 1)[-1],
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    return get_peft_model(model, lora)


def default_target(model: PreTrainedModel) -> list[str]:
    """The attention's output projection, as the paper has it, with its parent so that the name is
    unambiguous.

    Raises:
        NotImplementedError: If the model calls it by a name that is not known.
    """
    prefix, last = decoder_parts(model).layers_prefix, tail_layers(model)[-1]
    modules = dict(model.named_modules())
    names = [name for name in OUTPUT_PROJECTIONS if f"{prefix}.{last}.{name}" in modules]
    if not names:
        raise NotImplementedError(
            f"no attention output projection {OUTPUT_PROJECTIONS} in {prefix}.{last}; name it with "
            "target_modules"
        )
    return names


def prefix_tensor(model: PeftModel) -> Tensor:
    """The learnt prefix of the tail's layers alone, (num_virtual_tokens, L - k, 2 * kv_dim).

    Raises:
        ValueError: If the model carries no plain prefix.
    """
    settings = model.active_peft_config
    if not isinstance(settings, PrefixTuningConfig) or settings.prefix_projection:
        raise ValueError("the model carries no prefix without projection; nothing to cut out")
    weight = model.prompt_encoder[model.active_adapter].embedding.weight
    layers = tail_layers(model.get_base_model())
    return weight.view(weight.shape[0], settings.num_layers, -1)[:, layers.start :]


def save_tail(
    model: PreTrainedModel | PeftModel, folder: str | Path, spf: SPFConfig, *, simulated: bool
) -> None:
    """Write what was trained: the PEFT adapter, the SPF difference, a model card.

    Args:
        model: The trained tail.
        folder: Where to write.
        spf: Options of SPF.
        simulated: Whether no hardware protected the run; the card and the records then say so.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    note = SIMULATED if simulated else ""
    if isinstance(model, PeftModel):
        if isinstance(model.active_peft_config, PrefixTuningConfig):
            save_file({"prefix": prefix_tensor(model).detach().cpu().contiguous()}, folder / PREFIX_WEIGHTS)
        else:
            model.save_pretrained(folder)
    if spf_layers(model):
        save_spf(model, folder, spf, note=note)
    first = tail_layers(model.get_base_model() if isinstance(model, PeftModel) else model)[0]
    lines = [
        "# Tail trained with tee-split",
        "",
        f"Layers {first} and above were trained; the layers before were frozen.",
    ]
    if simulated:
        lines += ["", f"**{SIMULATED}**: the server showed simulated evidence."]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
