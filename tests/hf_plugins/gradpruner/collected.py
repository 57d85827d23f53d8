"""A short real LoRA run on a tiny model, for tests of what comes after it."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_plugins.gradpruner import GradPrunerCallback, GradPrunerConfig
from tests.hf_plugins import tiny_models


def with_lora(model: PreTrainedModel, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    settings = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"} | options
    return get_peft_model(model, LoraConfig(**settings))


def rows(count: int = 32) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in tiny_models.token_ids(count, 8)]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    settings = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1000,
        "seed": 3,
    }
    return TrainingArguments(output_dir=str(folder), **settings | options)


def collect(
    folder: Path, family: str = "llama", *, model: Any = None, config: Any = None, **options: Any
) -> GradPrunerCallback:
    """Train LoRA for the scored steps; the callback holds scores and history."""
    callback = GradPrunerCallback(config or GradPrunerConfig(num_steps=4, n_prune=3, n_merge="2"))
    peft = with_lora(model if model is not None else tiny_models.build(family))
    Trainer(peft, arguments(folder, **options), train_dataset=rows(), callbacks=[callback]).train()
    return callback
