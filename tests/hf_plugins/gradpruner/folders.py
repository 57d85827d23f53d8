"""Tiny models with tokenizers, and rows of text, as folders and files for the command."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.hf_plugins import tiny_models


def tokenizer(pad_token: str | None = "w2") -> PreTrainedTokenizerFast:
    """Words w0 .. w95; w1 ends, w2 pads and stands for the unknown."""
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(tiny_models.VOCABULARY)}, unk_token="w2"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="w1", pad_token=pad_token, unk_token="w2")


def causal_folder(folder: Path, pad_token: str | None = "w2") -> Path:
    """A Llama of six layers."""
    tiny_models.build("llama").save_pretrained(folder)
    tokenizer(pad_token).save_pretrained(folder)
    return folder


def classifier_folder(folder: Path) -> Path:
    """A BERT of six layers without a head, as MiniLM comes."""
    tiny_models.build("bert").bert.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int = 32) -> Path:
    """Random words; the label says whether the first word has an even number."""
    ids = torch.randint(
        3, tiny_models.VOCABULARY, (count, 6), generator=torch.Generator().manual_seed(0)
    ).tolist()
    rows = [{"text": " ".join(f"w{i}" for i in row), "label": row[0] % 2} for row in ids]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
