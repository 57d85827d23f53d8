"""Cut any supported transformers decoder in two, and load only one half of a checkpoint."""

import hashlib
import json
import threading
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hf_plugins.decoder_layers import find_decoder_layers
from hf_plugins.recipes import check_shard_names
from hf_plugins.tee_split.split import (
    Side,
    SkippedLayer,
    ZeroPositions,
    check_cut,
    names_of_half,
    skip_layers,
)

VERIFIED = frozenset(
    "apertus arcee bitnet cohere cohere2 diffllama ernie4_5 exaone4 gemma gemma2 gemma3_text glm glm4 gpt2 "
    "gpt_neox gpt_oss granite granitemoe helium hunyuan_v1_dense llama minimax ministral mistral mixtral "
    "nemotron olmo olmo2 olmo3 olmoe phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe "
    "qwen3_next seed_oss smollm3 stablelm starcoder2".split()
)
"""Model types whose halves give bit-equal logits, loss and gradients in this room's tests."""

REFUSED = {
    "gemma3n": "its layers read per-layer embeddings of the token ids, which never leave the client",
    "gemma3n_text": "its layers read per-layer embeddings of the token ids, which never leave the client",
    "bloom": "its ALiBi bias is built from the token mask by layers with another signature",
    "falcon": "its decoder layers need arguments that a skipped layer cannot stand in for",
    "mpt": "its ALiBi bias is built per layer with another signature",
    "t5": "it is an encoder-decoder; only decoder-only models are cut",
    "bart": "it is an encoder-decoder; only decoder-only models are cut",
    "mamba": "it has no attention mask to hand over and its layers carry a state",
    "gpt_bigcode": "its learnt positions are added behind the embedding; only gpt2 has the repair",
    "opt": "its learnt positions are made from the attention mask inside of the decoder",
}
# Heads that a checkpoint stores under an older name.
OTHER_NAMES = {"lm_head.weight": "embed_out.weight"}
NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm")
_EMPTY = threading.Lock()


class DecoderParts(NamedTuple):
    """Where a causal language model keeps what the cut touches."""

    base: nn.Module
    """The model without its head."""
    layers: nn.ModuleList
    layers_prefix: str
    """Name of the layer list in the whole model, such as ``model.layers``."""
    norm: str
    """Attribute of the final norm on ``base``."""
    norm_prefix: str
    embedding_prefix: str
    head_prefix: str | None
    tied: bool
    """Whether the head uses the embedding's weight."""


def check_supported(config: PreTrainedConfig) -> None:
    """Check that a model type can be cut.

    Raises:
        NotImplementedError: If it cannot, with the reason, or nobody has verified it.
    """
    kind = config.model_type
    if kind in REFUSED:
        raise NotImplementedError(f"model type {kind!r} cannot be split: {REFUSED[kind]}.")
    if kind not in VERIFIED:
        raise NotImplementedError(
            f"model type {kind!r} has not been verified. Run `mmhf tee-split verify MODEL`; if it reports "
            "bit-equal halves, pass allow_unverified=True."
        )
    # Granite multiplies its embeddings on every call, also those that are handed in.
    if getattr(config, "embedding_multiplier", 1.0) != 1.0:
        raise NotImplementedError(
            f"model type {kind!r} with embedding_multiplier={config.embedding_multiplier} cannot be split: "
            "the server would multiply the hidden state once more. Fold the factor into the embedding "
            "weights first."
        )


def decoder_parts(model: PreTrainedModel) -> DecoderParts:
    """Find layer list, norm, embedding and head of a causal language model.

    Raises:
        NotImplementedError: If there is no final norm where decoder-only models keep it.
        ValueError: If the model is an encoder-decoder, or its layers are not one list.
    """
    names = {module: name for name, module in model.named_modules()}
    base = model.base_model
    stack = find_decoder_layers(model)
    norm = next((name for name in NORMS if isinstance(getattr(base, name, None), nn.Module)), None)
    if norm is None or base is model:
        raise NotImplementedError(
            f"{type(model).__name__} has no final norm under {NORMS} beside its layers; only decoder-only "
            "causal language models are split."
        )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return DecoderParts(
        base=base,
        layers=stack.modules,
        layers_prefix=stack.name,
        norm=norm,
        norm_prefix=names[getattr(base, norm)],
        embedding_prefix=names[embedding],
        head_prefix=None if head is None else names[head],
        tied=bool(model.config.tie_word_embeddings),
    )


def split_model(
    model: PreTrainedModel, k: int, side: Side, *, allow_unverified: bool = False
) -> PreTrainedModel:
    """Turn a causal language model into one half of itself, in place.

    The client's half computes ``hidden_states(model, ...)`` through embedding and layers 0 to k-1; the
    server's takes them as ``inputs_embeds`` and computes the rest. Layer numbers, parameter names and the
    config stay those of the whole model.

    Args:
        model: The whole model.
        k: Number of layers on the client, 1 to L-1; the paper's is L // 2.
        side: ``client`` or ``server``.
        allow_unverified: Take a model type that this room has not verified; never one that is refused.

    Returns:
        ``model``, cut. The client's half is frozen and in eval mode.

    Raises:
        NotImplementedError: If the model type cannot be cut.
        ValueError: If k leaves a side without layers.

    Source: arXiv 2401.09796, method 2 (layer split); departures in the room's README.
    """
    if not allow_unverified or model.config.model_type in REFUSED:
        check_supported(model.config)
    parts = decoder_parts(model)
    check_cut(k, len(parts.layers))
    skip_layers(parts.layers, k, side)
    if side == "client":
        setattr(parts.base, parts.norm, SkippedLayer())
        if parts.head_prefix is not None:
            model.set_submodule(parts.head_prefix, nn.Identity())
        return model.requires_grad_(False).eval()
    _keep_server_from_embedding_again(model, parts)
    return model


def _keep_server_from_embedding_again(model: PreTrainedModel, parts: DecoderParts) -> None:
    if not parts.tied:
        model.set_submodule(parts.embedding_prefix, nn.Identity())
    if model.config.model_type == "gpt2":
        # GPT-2 adds positions to whatever is handed in, and drops out after that; the client did both.
        parts.base.wpe = ZeroPositions(parts.base.wpe)
        parts.base.drop = nn.Identity()


@torch.no_grad()
def hidden_states(client: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """What a client's half sends: the hidden state behind layer k-1, (N, T, d).

    Args:
        client: Half of `split_model`.
        input_ids: (N, T) token ids, padded on the right.
        attention_mask: (N, T), 1 on tokens.

    Raises:
        ValueError: If the padding is not on the right.
    """
    if bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
        raise ValueError(
            "pad on the right: positions count from the first token. Set tokenizer.padding_side='right'."
        )
    position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    return client.base_model(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
    ).last_hidden_state


def model_digest(folder: str | Path) -> str:
    """SHA-256 over a checkpoint's config, tensor names, shapes and the first bytes of every tensor.

    It tells two checkpoints apart without reading them whole.
    """
    folder, digest = Path(folder), hashlib.sha256()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    digest.update(json.dumps(config, sort_keys=True).encode())
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                part = file.get_slice(name)
                first = file.get_tensor(name) if not part.get_shape() else part[:1]
                raw = first.flatten()[:64].contiguous().view(torch.uint8).numpy().tobytes()
                digest.update(f"{name} {part.get_dtype()} {part.get_shape()}".encode() + raw)
    return digest.hexdigest()


class Half(NamedTuple):
    """A half loaded from disk."""

    model: PreTrainedModel
    bytes_read: int
    """Bytes of the tensors read from the checkpoint."""


def load_half(
    folder: str | Path,
    k: int,
    side: Side,
    *,
    dtype: torch.dtype | None = None,
    allow_unverified: bool = False,
) -> Half:
    """Load one half of a checkpoint, reading only the tensors it needs.

    Args:
        folder: Local ``save_pretrained`` folder with safetensors files.
        k: The cut.
        side: Whose half.
        dtype: Of the parameters; that of the checkpoint's config by default.
        allow_unverified: See `split_model`.

    Returns:
        The half on the CPU, and how many bytes were read.

    Raises:
        FileNotFoundError: If there is no safetensors checkpoint.
        KeyError: If a tensor of the half is missing in it.
        NotImplementedError, ValueError: As `split_model`.
    """
    # The switch to empty weights holds for all threads of the process, so two loads must not overlap.
    with _EMPTY:
        return _load_half(Path(folder), k, side, dtype, allow_unverified)


def _load_half(folder: Path, k: int, side: Side, dtype: torch.dtype | None, allow_unverified: bool) -> Half:
    config = AutoConfig.from_pretrained(folder)
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    # Parameters cost nothing here; buffers that no checkpoint holds (rotary frequencies) get their values.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    parts = decoder_parts(model)
    head = [] if parts.head_prefix is None else [parts.head_prefix]
    wanted = names_of_half(
        [name for name, _ in model.named_parameters(remove_duplicate=False)]
        + [
            name
            for name in model.state_dict()
            if name not in dict(model.named_parameters(remove_duplicate=False))
        ],
        prefix=parts.layers_prefix,
        k=k,
        num_layers=len(parts.layers),
        side=side,
        client_only=[] if parts.tied else [parts.embedding_prefix],
        server_only=[parts.norm_prefix, *head],
    )
    split_model(model, k, side, allow_unverified=allow_unverified)
    present = set(model.state_dict())
    tensors, read = _read(folder, [name for name in wanted if name in present], parts)
    model.load_state_dict(
        {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        },
        strict=False,
        assign=True,
    )
    if parts.tied and side == "server":
        model.tie_weights()
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if left:
        raise KeyError(f"the checkpoint in {folder} lacks {left[:5]}; it does not belong to its config.json")
    if side == "client":
        model.requires_grad_(False)
    return Half(model.eval(), read)


def _read(folder: Path, names: list[str], parts: DecoderParts) -> tuple[dict[str, Tensor], int]:
    where = _index(folder)
    tied = f"{parts.head_prefix}.weight" if parts.tied else None
    found: dict[str, Tensor] = {}
    by_file: dict[Path, list[tuple[str, str]]] = {}
    for name in names:
        if name == tied and name not in where:
            continue
        # A checkpoint of the bare model lacks the prefix that the one with a head has.
        candidates = (name, name.split(".", 1)[-1], OTHER_NAMES.get(name, name))
        stored = next((candidate for candidate in candidates if candidate in where), None)
        if stored is None:
            raise KeyError(
                f"the checkpoint in {folder} has no tensor {name!r}: it does not belong to its config.json, "
                "or stores its experts under other names. Load the whole model with from_pretrained and call "
                "split_model."
            )
        by_file.setdefault(where[stored], []).append((name, stored))
    for path, pairs in by_file.items():
        with safe_open(path, framework="pt") as file:
            for name, stored in pairs:
                found[name] = file.get_tensor(stored)
    return found, sum(tensor.nbytes for tensor in found.values())


def _index(folder: Path) -> dict[str, Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        check_shard_names(folder, weight_map.values())
        return {name: folder / file for name, file in weight_map.items()}
    if not single.is_file():
        raise FileNotFoundError(
            f"{folder} has neither model.safetensors nor its index; save the model with save_pretrained first"
        )
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)
