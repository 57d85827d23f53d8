"""Tiny random transformers for tests: real classes of the library, a few thousand weights, no download."""

from collections.abc import Callable

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 96
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def llama(num_layers: int = 6, **changes: object) -> PreTrainedModel:
    """Llama with grouped keys and values."""
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=num_layers, **COMMON | changes)).eval()


def mistral(num_layers: int = 6, **changes: object) -> PreTrainedModel:
    """Mistral with a short sliding window."""
    options = {"sliding_window": 8} | changes
    return MistralForCausalLM(MistralConfig(num_hidden_layers=num_layers, **COMMON | options)).eval()


def qwen2(num_layers: int = 6, **changes: object) -> PreTrainedModel:
    """Qwen2 with biases and a mix of full and sliding layers, not periodic."""
    kinds = [
        "full_attention",
        "sliding_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
    ]
    options = {
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": [kinds[i % len(kinds)] for i in range(num_layers)],
    }
    return Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=num_layers, **COMMON | options | changes)).eval()


def gemma2(num_layers: int = 6, **changes: object) -> PreTrainedModel:
    """Gemma-2: tied embeddings, sliding and full layers in turns."""
    options = {"sliding_window": 4, "head_dim": 8, "query_pre_attn_scalar": 8}
    return Gemma2ForCausalLM(Gemma2Config(num_hidden_layers=num_layers, **COMMON | options | changes)).eval()


def gpt2(num_layers: int = 6, **changes: object) -> PreTrainedModel:
    """GPT-2: Conv1D modules, whose weights are (in, out), and attribute names of its own."""
    options = {"vocab_size": VOCABULARY, "n_embd": 32, "n_head": 4, "n_positions": 64}
    options |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(n_layer=num_layers, **options | changes)).eval()


def bert(num_layers: int = 6, **changes: object) -> PreTrainedModel:
    """BERT with a classifier of three classes: an encoder, the form of MiniLM."""
    options = {name: value for name, value in COMMON.items() if name != "num_key_value_heads"}
    options |= {"num_labels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(num_hidden_layers=num_layers, **options | changes)).eval()


def t5(num_layers: int = 2, **changes: object) -> PreTrainedModel:
    """T5, an encoder-decoder."""
    options = {"vocab_size": VOCABULARY, "d_model": 32, "d_ff": 48, "num_heads": 4, "d_kv": 8}
    return T5ForConditionalGeneration(T5Config(num_layers=num_layers, **options | changes)).eval()


CAUSAL: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "gemma2": gemma2,
    "gpt2": gpt2,
}


def build(
    name: str, num_layers: int = 6, *, seed: int = 0, spread: float = 0.2, **changes: object
) -> PreTrainedModel:
    """A tiny model whose matrices are large enough that every layer changes the logits visibly.

    Args:
        name: ``llama``, ``mistral``, ``qwen2``, ``gemma2``, ``gpt2`` or ``bert``.
        num_layers: Its layers.
        seed: Of the weights.
        spread: Standard deviation of the matrices; the library's 0.02 makes layers nearly the identity.
        **changes: Passed to the model's config.

    Returns:
        The model in eval mode, fp32.
    """
    torch.manual_seed(seed)
    model = (CAUSAL | {"bert": bert})[name](num_layers, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, spread)
    return model


def token_ids(rows: int = 2, length: int = 12, *, seed: int = 0) -> torch.Tensor:
    """Random token ids (rows, length), none of them special."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
