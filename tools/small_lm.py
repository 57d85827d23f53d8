"""Pre-train a small Llama-style language model on real English text, so that recipes have one to work on
offline: ``python tools/small_lm.py work_dirs/small_lm``.

The folder it writes loads with ``AutoModelForCausalLM.from_pretrained`` and
``AutoTokenizer.from_pretrained``; ``heldout.txt`` holds the documents that training never saw,
``small_lm.json`` what was done and the held-out perplexity. An interrupted run goes on from its last
checkpoint. Text of the sets used as downstream tasks (GSM8K, PubMedQA, financial phrasebank) takes no part.
"""

import argparse
import json
import math
import random
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint  # noqa: E402

from hf_plugins.whole_files import write_json  # noqa: E402
from tools.real_data import data_set, read_rows, read_text  # noqa: E402

END = "<|endoftext|>"
VOCABULARY = 4096
BLOCK = 256
# Every twentieth document is set aside before anything else looks at the text.
HELDOUT_EVERY = 20


def _chunks(text: str, lines: int) -> list[str]:
    rows = text.split("\n")
    return ["\n".join(rows[start : start + lines]).strip() for start in range(0, len(rows), lines)]


def documents() -> list[str]:
    """Documents of the corpus: WikiText-2, Shakespeare, C4, medical answers, common-sense items, reviews.

    Returns:
        Texts of some hundred characters to some thousand each, in a fixed order.
    """
    text = data_set("lm_text")
    found = _chunks(read_text(text / "wikitext2_valid.txt.gz"), 12)
    found += _chunks(read_text(text / "tinyshakespeare.txt.gz"), 40)
    found += [row["text"] for row in read_rows(text / "c4_demo.jsonl.gz")]
    for name in ("hellaswag", "arc", "piqa", "winogrande", "medquad", "banking77", "sst2"):
        for path in sorted(data_set(name).glob("*train*.jsonl.gz")) + sorted(
            data_set(name).glob("val*.jsonl.gz")
        ):
            rows = [" ".join(_strings(row)) for row in read_rows(path)]
            # Short rows stand together, as sentences of one page do.
            found += ["\n".join(rows[start : start + 8]) for start in range(0, len(rows), 8)]
    return [document for document in found if len(document) > 200]


def _strings(row: Any) -> Iterable[str]:
    if isinstance(row, str):
        yield row
    elif isinstance(row, dict):
        for value in row.values():
            yield from _strings(value)
    elif isinstance(row, list):
        for value in row:
            yield from _strings(value)


def split_documents(found: Sequence[str]) -> tuple[list[str], list[str]]:
    """Training and held-out documents; the held-out share is one in twenty, spread over all sources."""
    heldout = list(found[HELDOUT_EVERY - 1 :: HELDOUT_EVERY])
    training = [text for index, text in enumerate(found) if index % HELDOUT_EVERY != HELDOUT_EVERY - 1]
    return training, heldout


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 4,096 tokens, learnt on the training documents alone."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=END, bos_token=END)


def blocks(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> torch.Tensor:
    """Documents joined by the end token and cut into rows of 256 tokens, (num_blocks, 256) int64."""
    stream: list[int] = []
    for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    whole = len(stream) // BLOCK * BLOCK
    return torch.tensor(stream[:whole]).view(-1, BLOCK)


@torch.no_grad()
def perplexity(model: torch.nn.Module, rows: torch.Tensor, *, batch_size: int = 8) -> tuple[float, float]:
    """Perplexity and next-token accuracy of a causal model on rows of token ids, (num_blocks, block)."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    loss, right = 0.0, 0
    for batch in rows.split(batch_size):
        ids = batch.to(device)
        logits = model(input_ids=ids).logits[:, :-1].float()
        target = ids[:, 1:]
        loss += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), target.flatten(), reduction="sum"
        ).item()
        right += int((logits.argmax(-1) == target).sum())
    model.train(training)
    count = rows.shape[0] * (rows.shape[1] - 1)
    return math.exp(loss / count), right / count


def pretrain(
    folder: Path, *, num_steps: int = 1600, batch_size: int = 8, learning_rate: float = 2e-3, seed: int = 0
) -> Path:
    """Train the model into ``folder`` unless it lies there already.

    Args:
        folder: Where the model, the tokenizer and the held-out text go.
        num_steps: Optimizer steps of ``batch_size * 256`` tokens.
        batch_size: Blocks per step.
        learning_rate: Peak of the cosine schedule.
        seed: Of the weights and the order of blocks.

    Returns:
        ``folder``, complete.
    """
    settings = {
        "num_steps": num_steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    note = folder / "small_lm.json"
    if note.is_file() and json.loads(note.read_text(encoding="utf-8"))["settings"] == settings:
        return folder
    training, heldout = split_documents(documents())
    tokenizer = train_tokenizer(training)
    rows, unseen = blocks(tokenizer, training), blocks(tokenizer, heldout)
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=10,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    work = folder / "training"
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    data = Dataset.from_dict({"input_ids": rows[order].tolist()}).map(
        lambda batch: {"labels": batch["input_ids"]}, batched=True
    )
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=num_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        weight_decay=0.1,
        adam_beta2=0.95,
        bf16=True,
        logging_steps=50,
        save_steps=200,
        save_total_limit=1,
        report_to=[],
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
    )
    model = LlamaForCausalLM(config)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=default_data_collator,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work)) if work.is_dir() else None)
    loss, accuracy = perplexity(model, unseen)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "heldout.txt").write_text(f"\n{END}\n".join(heldout), encoding="utf-8")
    record = {
        "settings": settings,
        "training_tokens": rows.numel(),
        "seen_tokens": num_steps * batch_size * BLOCK,
        "heldout_tokens": unseen.numel(),
        "heldout_perplexity": loss,
        "heldout_accuracy": accuracy,
    }
    write_json(note, record)
    shutil.rmtree(work)
    return folder


def heldout_blocks(folder: Path, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Rows of the text that pre-training never saw, (num_blocks, 256) int64."""
    return blocks(tokenizer, (folder / "heldout.txt").read_text(encoding="utf-8").split(f"\n{END}\n"))


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, say what came out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument("--num-steps", type=int, default=1600, help="optimizer steps of 2,048 tokens")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    folder = pretrain(options.folder, num_steps=options.num_steps, seed=options.seed)
    print((folder / "small_lm.json").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
