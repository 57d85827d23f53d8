"""Tiny random models and data sets for the tests of this room."""

from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
    default_data_collator,
)

from hf_plugins.dp.config import DPConfig
from hf_plugins.dp.trainer import DPTrainer

WORDS, LENGTH = 32, 6


def bert(*, seed: int = 0, dropout: float = 0.0, labels: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=WORDS,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=12,
            max_position_embeddings=LENGTH,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            num_labels=labels,
        )
    )


def llama(*, seed: int = 0, tied: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
            tie_word_embeddings=tied,
        )
    )


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=WORDS,
        n_embd=8,
        n_layer=1,
        n_head=2,
        n_positions=16,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    return GPT2LMHeadModel(config)


def lora(model: nn.Module, targets: list[str]) -> nn.Module:
    torch.manual_seed(1)
    # Adapters start at zero output; random ones have gradients in both halves.
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    return get_peft_model(model, config)


def classified(count: int = 24, *, seed: int = 0) -> Dataset:
    """Rows of tokens whose class is the parity of the first; the last positions of some rows are padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, WORDS, (count, LENGTH), generator=generator)
    mask = torch.ones_like(tokens)
    mask[::3, -2:] = 0
    tokens = tokens * mask
    rows = {"input_ids": tokens.tolist(), "attention_mask": mask.tolist()}
    users = [f"user {i % 7}" for i in range(count)]
    return Dataset.from_dict({**rows, "labels": (tokens[:, 0] % 2).tolist(), "user": users})


def written(count: int = 24) -> Dataset:
    """The same rows as text to continue."""
    rows = classified(count)
    labels = [
        [token if keep else -100 for token, keep in zip(ids, mask, strict=True)]
        for ids, mask in zip(rows["input_ids"], rows["attention_mask"], strict=True)
    ]
    return rows.remove_columns(["labels", "user"]).add_column("labels", labels)


def batch(rows: Dataset, count: int) -> dict[str, Tensor]:
    kept = rows.remove_columns("user") if "user" in rows.column_names else rows
    return default_data_collator([kept[i] for i in range(count)])


def arguments(folder: Any, **options: Any) -> TrainingArguments:
    chosen = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **options,
    }
    return TrainingArguments(str(folder), **chosen)


def trainer(
    folder: Any,
    *,
    model: nn.Module | None = None,
    dp: DPConfig | dict[str, Any] | None = None,
    rows: Dataset | None = None,
    trainer_class: type[DPTrainer] = DPTrainer,
    extra: dict[str, Any] | None = None,
    **options: Any,
) -> DPTrainer:
    """A trainer on the tiny classifier; ``options`` go to TrainingArguments, ``extra`` to the trainer."""
    if not isinstance(dp, DPConfig):
        # Much noise: the accountant is quick there, and it is asked after every training.
        dp = DPConfig(**{"noise_multiplier": 4.0, "seed": 0, **(dp or {})})
    return trainer_class(
        bert() if model is None else model,
        arguments(folder, **options),
        train_dataset=classified() if rows is None else rows,
        data_collator=default_data_collator,
        dp=dp,
        **(extra or {}),
    )


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])
