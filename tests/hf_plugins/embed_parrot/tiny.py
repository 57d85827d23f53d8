"""Tiny models of random weights and a tokenizer learnt from the sample texts; nothing is downloaded."""

import functools
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

TEXTS = Path(__file__).resolve().parents[2] / "data" / "leak_text"
SMALL = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}


def texts(language: str = "en") -> list[str]:
    """Sample texts, English or Chinese."""
    lines = (TEXTS / f"{language}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 384 tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=["<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>")


def llama(seed: int = 0, **options: object) -> LlamaForCausalLM:
    """A causal model; the options are those of its config."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(SMALL | {"num_key_value_heads": 2} | options)))


def causal_models() -> dict[str, torch.nn.Module]:
    """One small model of each of several families."""
    torch.manual_seed(0)
    grouped = SMALL | {"num_key_value_heads": 1}
    gpt2 = {
        "vocab_size": 384,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 2,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return {
        "llama": llama(),
        "mistral": MistralForCausalLM(MistralConfig(**grouped)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**grouped)),
        "gpt2": GPT2LMHeadModel(GPT2Config(**gpt2)),
    }


def bert(seed: int = 0) -> BertModel:
    """An encoder."""
    torch.manual_seed(seed)
    options = {key: value for key, value in SMALL.items() if not key.endswith("_token_id")}
    return BertModel(BertConfig(**options))
