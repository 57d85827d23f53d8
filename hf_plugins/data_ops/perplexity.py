"""Drop texts that a causal language model finds strange."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset

from hf_plugins.data_ops.op import DataOp, OpContext, register, row_texts, select_rows


@cache
def model_hash(folder: str) -> str:
    """SHA-256 over config and weights of a model's folder.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    files = [
        p for p in sorted(Path(folder).glob("*")) if p.suffix in (".json", ".safetensors", ".bin", ".model")
    ]
    if not files:
        raise FileNotFoundError(
            f"no model in {folder!r}; give the folder that save_pretrained wrote, nothing is downloaded."
        )
    whole = hashlib.sha256()
    for path in files:
        whole.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                whole.update(block)
    return whole.hexdigest()


@torch.no_grad()
def perplexities(
    model: Any, tokenizer: Any, texts: Sequence[str], *, batch_size: int = 16, max_length: int = 1024
) -> list[float]:
    """exp of the mean negative log-likelihood of each text's tokens, the first one aside.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        texts: Any texts; one of fewer than two tokens has infinite perplexity.
        batch_size: Texts run at once.
        max_length: Tokens read of a text.

    Returns:
        One figure a text, >= 1.
    """
    encoded = tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=max_length)[
        "input_ids"
    ]
    # Texts of like length together: padding costs as much as text.
    order = sorted(range(len(texts)), key=lambda index: len(encoded[index]))
    found = [math.inf] * len(texts)
    for start in range(0, len(order), batch_size):
        rows = [index for index in order[start : start + batch_size] if len(encoded[index]) > 1]
        if not rows:
            continue
        width = max(len(encoded[index]) for index in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for place, index in enumerate(rows):
            ids[place, : len(encoded[index])] = torch.tensor(encoded[index])
            mask[place, : len(encoded[index])] = 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        valid = mask[:, 1:].float()
        means = (losses * valid).sum(1) / valid.sum(1)
        for index, mean in zip(rows, means.tolist(), strict=True):
            found[index] = math.exp(min(mean, 700.0))
    return found


@register
@dataclass(frozen=True, kw_only=True)
class PerplexityFilter(DataOp):
    """Drops texts whose perplexity under a causal model is above ``max_ppl`` or among the highest share.

    Data-Juicer measures with a KenLM model, here any Hugging Face causal model does; the scales differ, so
    ``max_ratio`` (drop this share of rows, the strangest) carries over between models and ``max_ppl`` does
    not.
    """

    name: ClassVar[str] = "perplexity_filter"
    idempotent: ClassVar[bool] = False
    text_key: str | tuple[str, ...] = "text"
    hf_model: str
    """Folder of the model and its tokenizer."""
    max_ppl: float | None = 1500.0
    max_ratio: float | None = None
    batch_size: int = 16
    max_length: int = 1024

    def __post_init__(self) -> None:
        if self.max_ppl is None and self.max_ratio is None:
            raise ValueError(f"{self.name}: set max_ppl or max_ratio; with neither nothing would be dropped.")
        if self.max_ratio is not None and not 0 <= self.max_ratio < 1:
            raise ValueError(
                f"{self.name}: max_ratio must lie in [0, 1); got {self.max_ratio}. Write 0.05 for 5 %."
            )

    def materials(self) -> tuple[str, ...]:
        """Hash of the model."""
        return (model_hash(self.hf_model),)

    def apply(self, dataset: Dataset, context: OpContext) -> Dataset:
        """Measure all rows, drop the strange ones."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.hf_model)
        model = AutoModelForCausalLM.from_pretrained(self.hf_model).eval()
        if torch.cuda.is_available():
            model = model.cuda()
        values: list[float] = []
        step = 16 * self.batch_size
        for start in range(0, len(dataset), step):
            texts = row_texts(dataset[start : start + step], self.text_key)
            values += perplexities(
                model, tokenizer, texts, batch_size=self.batch_size, max_length=self.max_length
            )
            if context.progress:
                context.progress(self.name, len(values), len(dataset))
        limit = math.inf if self.max_ppl is None else self.max_ppl
        drop = {index for index, value in enumerate(values) if value > limit}
        if self.max_ratio:
            # Ties are broken by place, so exactly floor(share * rows) rows are meant.
            order = sorted(range(len(values)), key=lambda index: (-values[index], index))
            drop |= set(order[: int(self.max_ratio * len(values))])
        reasons = [
            f"perplexity {value:.4g} too high" if index in drop else None
            for index, value in enumerate(values)
        ]
        return select_rows(dataset, reasons, context, self.name, values)
