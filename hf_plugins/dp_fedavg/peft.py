"""Text tasks: a pretrained encoder with LoRA, users as ``Trainer`` clients; d is that of the adapters."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
    set_seed,
)

from hf_plugins.dp_fedavg.config import RunConfig
from hf_plugins.dp_fedavg.dataset import find_file, read_bytes
from hf_plugins.dp_fedavg.hook import gradient_term
from hf_plugins.rounds import TrainableVector, TrainerClient, dirichlet_split


class TextUsers:
    """Users of a text task: texts split over them by a Dirichlet law over labels.

    Args:
        run: Options of the recipe; ``data`` is a folder with ``train*.jsonl`` and ``test*.jsonl``.
        local: Fields of ``TrainingArguments`` for the local training.
    """

    def __init__(self, run: RunConfig, local: dict[str, Any]) -> None:
        folder = Path(run.data)
        train, test = (read_rows(find_file(folder, f"{part}*.jsonl*")) for part in ("train", "test"))
        if run.max_test_records:
            test = test[: run.max_test_records]
        labels = [int(row["label"]) for row in train]
        self.num_labels = max(labels + [int(row["label"]) for row in test]) + 1
        self.owners = dirichlet_split(labels, run.num_clients, alpha=run.alpha, seed=run.model_seed)
        if run.max_records:
            self.owners = [rows[: run.max_records] for rows in self.owners]
        self.tokenizer = AutoTokenizer.from_pretrained(run.model)
        self.train = self._tokenised(train, run.max_length)
        self.test = self._tokenised(test, run.max_length)
        self.model = lora_classifier(run, self.num_labels)
        self.weights = TrainableVector(self.model)
        self.arguments = TrainingArguments(
            output_dir=run.output_dir,
            **{"lr_scheduler_type": "constant", "max_grad_norm": 0.0, **local},
        )

    def _tokenised(self, rows: list[dict[str, Any]], max_length: int) -> Dataset:
        texts, labels = [row["text"] for row in rows], [int(row["label"]) for row in rows]
        ids = self.tokenizer(texts, truncation=True, max_length=max_length)
        return Dataset.from_dict({**ids, "labels": labels})

    def __len__(self) -> int:
        return len(self.owners)

    def client(self, client_id: int) -> TrainerClient:
        """One user, made when asked for."""
        return TrainerClient(
            client_id,
            self.train.select(np.asarray(self.owners[client_id])),
            self.arguments,
            trainer_kwargs={"data_collator": DataCollatorWithPadding(self.tokenizer)},
            terms=[gradient_term],
        )

    def evaluate(self, vector_D: torch.Tensor) -> dict[str, float]:
        """Loss and accuracy of the global model on the test texts, under ``test/``."""
        self.weights.write_(vector_D)
        self.model.eval()
        collate = DataCollatorWithPadding(self.tokenizer)
        right, loss = 0, 0.0
        with torch.no_grad():
            for start in range(0, len(self.test), 128):
                batch = collate([self.test[i] for i in range(start, min(start + 128, len(self.test)))])
                out = self.model(**batch)
                right += int((out.logits.argmax(-1) == batch["labels"]).sum())
                loss += float(out.loss) * len(batch["labels"])
        return {"test/loss": loss / len(self.test), "test/accuracy": right / len(self.test)}


def lora_classifier(run: RunConfig, num_labels: int) -> nn.Module:
    """The encoder with LoRA on its attention and a new classification head; only those are trained."""
    set_seed(run.model_seed)
    base = AutoModelForSequenceClassification.from_pretrained(run.model, num_labels=num_labels)
    adapters = LoraConfig(
        task_type="SEQ_CLS",
        r=run.lora_rank,
        lora_alpha=2 * run.lora_rank,
        target_modules=["query", "value"],
        lora_dropout=0.0,
    )
    return get_peft_model(base, adapters)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file.

    Raises:
        ValueError: If a row lacks ``text`` or ``label``.
    """
    rows = [json.loads(line) for line in read_bytes(path).decode().split("\n") if line.strip()]
    if not rows or not {"text", "label"} <= set(rows[0]):
        found = sorted(rows[0]) if rows else []
        raise ValueError(f"{path} needs rows with text and label (a class number); the first has {found}.")
    return rows
