"""Score and fine-tune with the stock trainers: ``Trainer`` for classifiers, trl's ``SFTTrainer`` for causal
models."""

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from hf_plugins.gradpruner.callback import GradPrunerCallback
from hf_plugins.gradpruner.config import GradPrunerConfig, RunConfig


def read_data(path: str | None, run: RunConfig, *, option: str) -> Dataset:
    """Rows of a JSON-lines file with the columns the options name.

    Args:
        path: File, plain or ``.gz``.
        run: Names of the columns.
        option: Name of the option that gave the path, for the message.

    Returns:
        The rows; classification has ``text`` and ``labels``, causal models what `SFTTrainer` takes.

    Raises:
        ValueError: If the path or a column is missing.
    """
    if path is None:
        raise ValueError(
            f"{option} is not set; name a JSON-lines file with {run.text_column!r} in every row."
        )
    rows = load_dataset("json", data_files=path, split="train")
    wanted = [name for name in (run.text_column, run.prompt_column, run.label_column) if name is not None]
    missing = sorted(set(wanted) - set(rows.column_names))
    if missing:
        raise ValueError(
            f"{path} has no column {missing}; it has {rows.column_names}. Set text_column, prompt_column "
            "or label_column."
        )
    if run.label_column is not None:
        rows = rows.map(lambda row: {"text": str(row[run.text_column]), "labels": int(row[run.label_column])})
        return rows.select_columns(["text", "labels"])
    if run.prompt_column is not None:
        rows = rows.map(
            lambda row: {"prompt": f"{row[run.prompt_column]}\n", "completion": str(row[run.text_column])}
        )
        return rows.select_columns(["prompt", "completion"])
    return rows.map(lambda row: {"text": str(row[run.text_column])}).select_columns(["text"])


def model_folder(name: str) -> str:
    """What ``from_pretrained`` takes: a folder or hub name as it is, or a folder inside an installed package.

    Args:
        name: ``path``, ``hub/name``, or ``package:NAME/SUBFOLDER``.

    Returns:
        Path or hub name.

    Raises:
        ValueError: If the package is not installed.
    """
    if not name.startswith("package:"):
        return name
    package, _, folder = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"model={name!r}: the package {package} is not installed. Install it, or name a folder."
        )
    return str(Path(next(iter(spec.submodule_search_locations))) / folder)


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Tokenizer of a model; one without a padding token pads with its end token."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(folder: str, run: RunConfig, num_labels: int) -> PreTrainedModel:
    """A classifier (new head) or a causal model."""
    if run.label_column is None:
        return AutoModelForCausalLM.from_pretrained(folder)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=num_labels)


def _accuracy(outcome: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((outcome.predictions.argmax(-1) == outcome.label_ids).mean())}


def _tokenised(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Dataset:
    return rows.map(
        lambda batch: tokenizer(batch["text"], truncation=max_length is not None, max_length=max_length),
        batched=True,
        remove_columns=["text"],
    )


def num_labels(rows: Dataset) -> int:
    """Classes of a classification set; 0 for text."""
    return 1 + max(rows["labels"]) if "labels" in rows.column_names else 0


def build_trainer(
    folder: str,
    run: RunConfig,
    args: SFTConfig,
    train: Dataset,
    evaluation: Dataset | None,
    *,
    lora: bool,
    callbacks: Sequence[GradPrunerCallback] = (),
) -> Trainer:
    """The host's trainer for a model and its data.

    Args:
        folder: Model to train.
        run: Kind of task and LoRA's size.
        args: Training arguments.
        train: Rows to train on.
        evaluation: Rows to evaluate on.
        lora: Train LoRA on all linear modules and not the weights themselves.
        callbacks: For the trainer.

    Returns:
        `SFTTrainer` for causal models, otherwise `Trainer`.
    """
    set_seed(args.seed)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, run, num_labels(train))
    peft = LoraConfig(
        r=run.lora_r,
        lora_alpha=run.lora_alpha,
        lora_dropout=run.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM" if run.label_column is None else "SEQ_CLS",
    )
    if run.label_column is None:
        return SFTTrainer(
            model,
            args=args,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            peft_config=peft if lora else None,
            callbacks=list(callbacks),
        )
    return Trainer(
        get_peft_model(model, peft) if lora else model,
        args,
        train_dataset=_tokenised(train, tokenizer, args.max_length),
        eval_dataset=None if evaluation is None else _tokenised(evaluation, tokenizer, args.max_length),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=_accuracy,
        callbacks=list(callbacks),
    )


def collect(run: RunConfig, config: GradPrunerConfig, args: SFTConfig) -> GradPrunerCallback:
    """Train LoRA for the scored steps; with ``history="scores"`` and a merge, a second time for its donors
    alone.

    The adapter is thrown away; the model on disk is not touched.

    Args:
        run: Model and data.
        config: Options.
        args: Training arguments; the schedule is theirs, the learning rate ``run.score_learning_rate``.

    Returns:
        The callback, full.
    """
    train = read_data(run.train_file, run, option="train_file")
    scoring = replace(args, learning_rate=run.score_learning_rate, save_strategy="no", eval_strategy="no")
    callback = GradPrunerCallback(config)
    build_trainer(run.model, run, scoring, train, None, lora=True, callbacks=[callback]).train()
    if config.history == "scores" and callback.plan().merged:
        plan = callback.plan()
        layers = {donor for donor, _ in plan.merged} | {receiver for _, receiver in plan.merged}
        again = GradPrunerCallback(replace(config, history="memory"), history_layers=layers)
        build_trainer(run.model, run, scoring, train, None, lora=True, callbacks=[again]).train()
        return again
    return callback


def calibration_batches(run: RunConfig, args: SFTConfig) -> list[dict[str, torch.Tensor]]:
    """Batches of training text without labels, for baselines that look at hidden states."""
    rows = read_data(run.train_file, run, option="train_file")
    rows = rows.select(range(min(run.calibration_rows, len(rows))))
    columns = [name for name in ("prompt", "text", "completion") if name in rows.column_names]
    texts = ["".join(row[name] for name in columns) for row in rows]
    tokenizer = load_tokenizer(run.model)
    size = args.per_device_train_batch_size
    return [
        dict(
            tokenizer(
                texts[i : i + size],
                padding=True,
                truncation=True,
                max_length=args.max_length,
                return_tensors="pt",
            )
        )
        for i in range(0, len(texts), size)
    ]


def finetune(folder: str, run: RunConfig, args: SFTConfig) -> dict[str, Any]:
    """Train the short model on all data and save it.

    Args:
        folder: The short model.
        run: Data, and full or LoRA.
        args: Training arguments; the result goes to ``output_dir/final``.

    Returns:
        Metrics of the evaluation (empty without ``eval_file``) and the training time.
    """
    train = read_data(run.train_file, run, option="train_file")
    evaluation = None if run.eval_file is None else read_data(run.eval_file, run, option="eval_file")
    trainer = build_trainer(folder, run, args, train, evaluation, lora=run.finetune == "lora")
    done = trainer.train()
    metrics = {"train_runtime": done.metrics["train_runtime"], "train_loss": done.metrics["train_loss"]}
    if evaluation is not None:
        metrics |= trainer.evaluate()
    trainer.save_model(str(Path(args.output_dir) / "final"))
    return metrics
