"""Model, data and trainer of a recipe: a text classifier or a causal language model, with LoRA if asked."""

from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from hf_plugins.dp.config import DPConfig, RunConfig
from hf_plugins.dp.trainer import DPTrainer


def read_records(path: str, run: RunConfig) -> Dataset:
    """Records of a JSON-lines file.

    Args:
        path: The file, plain or ``.gz``.
        run: Names the columns.

    Returns:
        The data set.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If a column is missing.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path} does not exist; give train_file and eval_file as paths of JSON lines."
        )
    records = load_dataset("json", data_files=path, split="train")
    missing = {run.text_column, *([run.label_column] if run.label_column else [])} - set(records.column_names)
    if missing:
        raise ValueError(
            f"{path} has the columns {sorted(records.column_names)}, not {sorted(missing)}. "
            "Set text_column and label_column."
        )
    return records


def tokenize(
    records: Dataset, run: RunConfig, tokenizer: PreTrainedTokenizerBase, user: str | None
) -> Dataset:
    """Token ids, the label if there is one, and the user if privacy is by user.

    Args:
        records: From `read_records`.
        run: Options of the recipe.
        tokenizer: The model's.
        user: Column of the user to keep, or None.

    Returns:
        What the trainer takes.
    """

    def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = dict(tokenizer(rows[run.text_column], truncation=True, max_length=run.max_length))
        if run.label_column:
            encoded["labels"] = rows[run.label_column]
        return encoded

    kept = {user} if user else set()
    return records.map(encode, batched=True, remove_columns=sorted(set(records.column_names) - kept))


def add_lora(model: nn.Module, run: RunConfig) -> nn.Module:
    """The model with adapters on all linear layers, or unchanged for rank 0.

    Args:
        model: A transformers model.
        run: Options of the recipe.

    Returns:
        A PEFT model, or the same model.
    """
    if not run.lora_rank:
        return model
    task = TaskType.SEQ_CLS if run.label_column else TaskType.CAUSAL_LM
    return get_peft_model(
        model,
        LoraConfig(
            task_type=task,
            r=run.lora_rank,
            lora_alpha=2 * run.lora_rank,
            lora_dropout=0.0,
            target_modules="all-linear",
        ),
    )


def recipe_trainer(run: RunConfig, args: TrainingArguments, dp: DPConfig) -> DPTrainer:
    """The trainer of a recipe, ready to train.

    Args:
        run: Model and data.
        args: The host's arguments.
        dp: Options of privacy.

    Returns:
        A `DPTrainer`.
    """
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    train = read_records(run.train_file, run)
    if run.label_column:
        labels = len(set(train[run.label_column]))
        model = AutoModelForSequenceClassification.from_pretrained(run.model, num_labels=labels)
        model.config.pad_token_id = tokenizer.pad_token_id
        collator: Any = DataCollatorWithPadding(tokenizer)
    else:
        model = AutoModelForCausalLM.from_pretrained(run.model)
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    rows = tokenize(train, run, tokenizer, dp.user_column)
    evaluation = tokenize(read_records(run.eval_file, run), run, tokenizer, None) if run.eval_file else None
    return DPTrainer(
        add_lora(model, run),
        args,
        train_dataset=rows,
        eval_dataset=evaluation,
        data_collator=collator,
        processing_class=tokenizer,
        dp=dp,
    )
