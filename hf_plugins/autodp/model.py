"""LESS on the model that is tuned: gradients of LoRA weights row by row, projected, compared with anchors."""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    set_seed,
)

from hf_plugins.autodp.dataset import ANSWER, QUESTION
from hf_plugins.autodp.held_out import IGNORED, row_losses
from hf_plugins.autodp.planted import plant
from hf_plugins.autodp.row_value import adam_direction, jl_project, keep_best, less_scores
from hf_plugins.data_ops.op import ROW_ID, DataOp, OpContext, content_key, register
from hf_plugins.data_ops.perplexity import model_hash

BETAS = (0.9, 0.999)


@register
@dataclass(frozen=True, kw_only=True)
class LessSelector(DataOp):
    """Keeps the share of rows whose gradients point most where those of the anchors do (LESS).

    A short LoRA training on some rows gives checkpoints; at each, Adam's directions of all rows are compared
    with the plain gradients of the anchors. The model is the one that is tuned; the release takes another.
    """

    name: ClassVar[str] = "less_selector"
    idempotent: ClassVar[bool] = False
    hf_model: str
    anchors: str
    """Arrow folder of the rows that the model should become good at."""
    ratio: float = 0.5
    checkpoints: int = 4
    warmup_ratio: float = 0.05
    learning_rate: float = 2e-5
    batch_size: int = 16
    lora_r: int = 128
    lora_alpha: int = 512
    projection_dim: int = 8192
    max_length: int = 2048
    seed: int = 0
    use_cpu: bool = False

    def materials(self) -> tuple[str, ...]:
        """Hashes of the model and of the anchors."""
        return model_hash(self.hf_model), content_key(load_from_disk(self.anchors))

    def params(self) -> dict[str, Any]:
        """Parameters; where the files lie does not enter a fingerprint, their content does."""
        return super().params() | {"hf_model": "", "anchors": ""}

    def columns(self) -> tuple[str, ...]:
        """Question and answer."""
        return QUESTION, ANSWER

    def apply(self, dataset: Dataset, context: OpContext) -> Dataset:
        """Score all rows, keep the best."""
        scores = self.scores(dataset, context)
        kept = set(keep_best(scores.tolist(), self.ratio).tolist())
        for index, row_id in enumerate(dataset[ROW_ID]):
            if index not in kept:
                context.ledger.add(self.name, row_id, "dropped", "low influence", float(scores[index]))
        return dataset.select(sorted(kept))

    def scores(self, dataset: Dataset, context: OpContext) -> Tensor:
        """Influence of each row, (rows,)."""
        device = "cuda" if torch.cuda.is_available() and not self.use_cpu else "cpu"
        set_seed(self.seed)
        tokenizer = AutoTokenizer.from_pretrained(self.hf_model)
        base = AutoModelForCausalLM.from_pretrained(self.hf_model, dtype=torch.float32).to(device)
        lora = LoraConfig(
            r=self.lora_r, lora_alpha=self.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = get_peft_model(base, lora)
        rows = encode_pairs(tokenizer, dataset, self.max_length)
        anchors = encode_pairs(tokenizer, load_from_disk(self.anchors), self.max_length)
        generator = torch.Generator().manual_seed(self.seed)
        count = min(len(rows), max(self.batch_size, math.ceil(self.warmup_ratio * len(rows))))
        warm = torch.randperm(len(rows), generator=generator)[:count].tolist()
        weights = [p for p in model.parameters() if p.requires_grad]
        # Adam's own moments are needed, so the few warm-up updates are made here.
        optimizer = torch.optim.AdamW(weights, lr=self.learning_rate, betas=BETAS, weight_decay=0.0)
        training, validation, rates = [], [], []
        updates = self.checkpoints * math.ceil(count / self.batch_size)
        step = 0
        for epoch in range(self.checkpoints):
            order = torch.randperm(count, generator=generator).tolist()
            used = []
            for start in range(0, count, self.batch_size):
                # Linear decay over all epochs; its mean in an epoch is that checkpoint's weight.
                rate = self.learning_rate * (1 - step / updates)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                batch = [rows[warm[i]] for i in order[start : start + self.batch_size]]
                optimizer.zero_grad()
                for row in batch:
                    (_loss(model, row, device) / len(batch)).backward()
                optimizer.step()
                used.append(rate)
                step += 1
            rates.append(sum(used) / len(used))
            moments = [
                torch.cat([optimizer.state[p][name].flatten() for p in weights])
                for name in ("exp_avg", "exp_avg_sq")
            ]
            training.append(self._features(model, weights, rows, device, moments, context, epoch))
            validation.append(self._features(model, weights, anchors, device, None, context, epoch))
        return less_scores(training, validation, rates)

    def _features(
        self,
        model: Any,
        weights: list[Tensor],
        rows: list[Any],
        device: str,
        moments: list[Tensor] | None,
        context: OpContext,
        epoch: int,
    ) -> Tensor:
        found = []
        block: list[Tensor] = []
        for index, row in enumerate(rows):
            gradient = torch.cat(
                [g.flatten() for g in torch.autograd.grad(_loss(model, row, device), weights)]
            )
            if moments is not None:
                gradient = adam_direction(gradient, *moments, beta1=BETAS[0], beta2=BETAS[1])
            block.append(gradient)
            # Signs are drawn anew for each block, so blocks are as large as memory allows without care.
            if len(block) * gradient.numel() >= 1 << 26 or index == len(rows) - 1:
                found.append(jl_project(torch.stack(block), self.projection_dim, seed=self.seed).cpu())
                block = []
            if context.progress and moments is not None:
                context.progress(self.name, epoch * len(rows) + index + 1, self.checkpoints * len(rows))
        return torch.cat(found)


def _loss(model: Any, row: tuple[list[int], list[int]], device: str) -> Tensor:
    prompt, answer = row
    ids = torch.tensor([prompt + answer], device=device)
    labels = torch.tensor([[IGNORED] * len(prompt) + answer], device=device)
    return row_losses(model(input_ids=ids).logits, labels)[0]


def encode_pairs(tokenizer: Any, rows: Dataset, max_length: int) -> list[tuple[list[int], list[int]]]:
    """Token ids of questions and answers; an answer ends with the end token and is never empty."""
    template = tokenizer.chat_template is not None
    found = []
    for question, answer in zip(rows[QUESTION], rows[ANSWER], strict=True):
        text = question + "\n"
        if template:
            turn = [{"role": "user", "content": question}]
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        # A prompt of at least one token: the first token of an answer must be predicted from something.
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
        ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids = ids[: max_length - 1]
        found.append((prompt[-(max_length - len(ids)) :], ids))
    return found


def tiny_model(
    folder: Path, texts: list[str], *, vocabulary: int = 400, width: int = 64, seed: int = 0
) -> Path:
    """A fresh decoder of 2 layers with a byte-level BPE learnt on the texts: for demos and
    tests.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    learner = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, learner)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")
    set_seed(seed)
    size = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        **size,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_demo(folder: Path, *, num_rows: int = 96, seed: int = 0) -> None:
    """Generated question-answer rows, half of them spoilt, clean held-out rows, and a tiny model for them."""
    generator = random.Random(seed)
    organs = ("heart", "liver", "kidney", "lung", "skin", "stomach", "bone", "eye", "ear", "brain", "foot")
    organs += ("hand", "back", "neck", "knee", "hip", "jaw")
    signs = ("pain", "fever", "swelling", "itching", "numbness", "fatigue", "bleeding", "cramps", "rashes")
    causes = ("an infection", "a lack of iron", "high pressure", "an allergy", "too little rest", "an injury")
    pairs = [
        (
            f"What causes {sign} of the {organ}?",
            f"The {sign} of the {organ} is often caused by {generator.choice(causes)}. "
            f"See a doctor if the {sign} does not stop.",
        )
        for organ in organs
        for sign in signs
    ]
    generator.shuffle(pairs)
    train, dev, test = pairs[:num_rows], pairs[num_rows : num_rows + 32], pairs[num_rows + 32 : num_rows + 56]
    # Copies of rows of the training part alone: `plant` draws from what it is given.
    spoilt = plant(train, {"garbled": 0.2, "boilerplate": 0.2, "duplicate": 0.1}, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    tables = {"rows": [pair[:2] for pair in spoilt], "dev": dev, "test": test}
    for name, rows in tables.items():
        lines = [json.dumps({QUESTION: question, ANSWER: answer}) for question, answer in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tiny_model(folder / "model", [f"{question}\n{answer}" for question, answer in pairs], seed=seed)


@torch.no_grad()
def encode_texts(folder: str, texts: list[str], *, batch_size: int = 32) -> np.ndarray:
    """Mean-pooled states of an encoder such as bge or MiniLM, rows of length 1, (texts, width) float32."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    def batches() -> Iterator[Tensor]:
        for start in range(0, len(texts), batch_size):
            some = tokenizer(
                texts[start : start + batch_size],
                padding=True,
                truncation=True,
                max_length=256,
                return_tensors="pt",
            )
            mask = some["attention_mask"].unsqueeze(-1).float()
            states = model(**some).last_hidden_state
            yield torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)

    return torch.cat(list(batches())).numpy()
