"""What a reader has at hand when a snippet of a document begins: a tiny real model, data, folders.

One function per document, named in `WORLDS`; it fills the working directory and returns the names that the
snippets use without making them. A document without an entry must run by itself.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.docs.blocks import ROOT

Names = dict[str, Any]


def dp(folder: Path) -> Names:
    """A tiny classifier and 1,100 records: a little more than the expected batch of the snippet."""
    from datasets import Dataset
    from transformers import TrainingArguments, default_data_collator

    from tests.hf_plugins.dp.tiny import LENGTH, WORDS, bert

    ids = torch.randint(3, WORDS, (1100, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": [row[0] % 2 for row in ids]})
    return {
        "model": bert(),
        "TrainingArguments": lambda *args, **options: TrainingArguments(
            *args, **options, use_cpu=True, report_to=[], disable_tqdm=True
        ),
        "train": rows,
        "dev": rows.select(range(32)),
        "collator": default_data_collator,
    }


def fapm(folder: Path) -> Names:
    """A base model in BASE, a fine-tuned one with LoRA, two tensors."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments

    from tests.hf_plugins.tiny_models import llama

    llama(2).save_pretrained("BASE")
    ids = torch.randint(3, 90, (8, 12), generator=torch.Generator().manual_seed(0)).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    arguments = TrainingArguments("trained", max_steps=2, save_steps=1, report_to=[], use_cpu=True)
    adapted = get_peft_model(
        LlamaForCausalLM.from_pretrained("BASE"), LoraConfig(r=2, init_lora_weights=False)
    )
    generator = torch.Generator().manual_seed(1)

    def trainer(_: object, callbacks: list[Any]) -> Trainer:
        made = Trainer(
            LlamaForCausalLM.from_pretrained("BASE"), arguments, train_dataset=rows, callbacks=callbacks
        )
        made.train()
        return made

    return {
        "Trainer": trainer,
        "w_pre": torch.randn(6, 5, generator=generator),
        "w_ft": torch.randn(6, 5, generator=generator),
        "peft_model": adapted,
    }


def gradpruner(folder: Path) -> Names:
    """A tiny Llama of 10 layers and a data set of token ids."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from tests.hf_plugins.tiny_models import llama
    from tools.small_lm import train_tokenizer

    llama(10).save_pretrained("model")
    tokenizer = train_tokenizer(["a"])
    ids = torch.randint(3, 90, (16, 8), generator=torch.Generator().manual_seed(0)).tolist()
    return {
        "name": "model",
        "model": llama(10).train(),
        "args": SFTConfig(
            "trained", max_steps=60, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False,
            gradient_checkpointing=False,
        ),
        "data": Dataset.from_dict({"input_ids": ids}),
        "lora": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        "SFTTrainer": lambda *args, **options: SFTTrainer(*args, processing_class=tokenizer, **options),
        "AutoModelForCausalLM": AutoModelForCausalLM,
    }  # fmt: skip


def embed_parrot(folder: Path) -> Names:
    """A Llama of 16 layers with a tokenizer, and a few texts."""
    from tests.hf_plugins.tiny_models import llama
    from tools.real_data import read_rows
    from tools.small_lm import train_tokenizer

    rows = read_rows(ROOT / "tests" / "data" / "leak_text" / "en.jsonl")
    texts = [next(iter(row.values())) for row in rows]
    tokenizer = train_tokenizer(texts[:40])
    return {
        "model": llama(16, vocab_size=len(tokenizer)),
        "tokenizer": tokenizer,
        "texts": [text[:60] for text in texts[:2]],
        "public": texts[6:30],
        "evaluate": lambda model: next(model.parameters()).mean().item(),
    }


def dp_fedavg(folder: Path) -> Names:
    """Two users with a few token ids each, a tiny LoRA model, and the two halves of a Flower app."""
    from datasets import Dataset
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from peft import LoraConfig, get_peft_model
    from transformers import TrainingArguments

    from tests.hf_plugins.tiny_models import llama

    ids = torch.randint(3, 90, (4, 6), generator=torch.Generator().manual_seed(0)).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    model = llama(1).train()
    return {
        "datasets": [rows.select([0, 1]), rows.select([2, 3])],
        "num_users": 2,
        "training_arguments": TrainingArguments(
            "local", max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=0.1
        ),
        "peft_model": get_peft_model(model, LoraConfig(r=1, target_modules=["q_proj"])),
        "model": model,
        "client_app": ClientApp(),
        "server_app": ServerApp(),
    }


def dpf_cm(folder: Path) -> Names:
    """A model that knows a few samples by heart, and prompts that it does not."""
    from tests.hf_plugins.dpf_cm.memorised import BENIGN, LOOKALIKE, PRIVATE, model, tokenizer

    return {
        "model": model(),
        "tokenizer": tokenizer(),
        "samples": PRIVATE,
        "safe_answers": [f"\u8bf7\u54a8\u8be2\u533b\u751f\u3002{number}" for number in range(len(PRIVATE))],
        "public_prompts": BENIGN[:60] + LOOKALIKE,
        "texts": [PRIVATE[0].prompt, BENIGN[0]],
    }


def autodp(folder: Path) -> Names:
    """Rows, a tiny model to tune and one to write, where the snippet says they are."""
    from transformers import AutoTokenizer, GenerationConfig

    from tests.hf_plugins.autodp import tiny

    for name in ("model", "writer"):
        tiny.model(folder / "path" / "to" / name)
    tokenizer = AutoTokenizer.from_pretrained(folder / "path" / "to" / "writer")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(folder / "path" / "to" / "writer")
    # Any token ends its answer: hundreds of them are asked for, and an untrained model has nothing to say.
    GenerationConfig(eos_token_id=list(range(len(tokenizer)))).save_pretrained(
        folder / "path" / "to" / "writer"
    )
    table = [
        {"question": f"{question} ({number})", "answer": answer}
        for number in range(2)
        for question, answer in tiny.PAIRS
    ]
    tiny.write_jsonl(folder / "rows.jsonl", table)
    return {}


def tee_split(folder: Path) -> Names:
    """A base model and the adapter with SPF that a split training has left."""
    from hf_plugins.tee_split.config import SPFConfig
    from hf_plugins.tee_split.peft import save_tail
    from tests.hf_plugins.tee_split.test_peft import trained

    whole, tail, _ = trained("llama", ratio=0.5)
    whole.save_pretrained("base")
    save_tail(tail, Path("adapter"), SPFConfig(ratio=0.5), simulated=False)
    return {}


def paper_index(folder: Path) -> Names:
    """A tiny GPT-2 where the snippet names a large one, and DPConfig, which one snippet takes for granted."""
    from transformers import GPT2Config, GPT2Model

    from hf_plugins.dp import DPConfig

    GPT2Model(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)).save_pretrained("gpt2-xl")
    return {"DPConfig": DPConfig}


WORLDS: dict[str, Callable[[Path], Names]] = {
    "README.md": dp,
    "docs/paper_index.md": paper_index,
    "hf_plugins/autodp/README.md": autodp,
    "hf_plugins/dp/README.md": dp,
    "hf_plugins/dp_fedavg/README.md": dp_fedavg,
    "hf_plugins/dpf_cm/README.md": dpf_cm,
    "hf_plugins/embed_parrot/README.md": embed_parrot,
    "hf_plugins/fapm/README.md": fapm,
    "hf_plugins/gradpruner/README.md": gradpruner,
    "hf_plugins/tee_split/README.md": tee_split,
}
# Fragments of a config of mmdet or mmseg begin with the line that the reader already has.
PANOPTIC = ROOT / "configs" / "spatialflow" / "spatialflow_r50_fpn_20e_coco.py"
MM_HEADS = {
    "bbox_head": f'_base_ = ["{PANOPTIC}"]\n',
    "val_evaluator": f'_base_ = ["{PANOPTIC}"]\n',
    "model": '_base_ = ["mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"]\n',
    "decode_head": '_base_ = ["mmseg::encnet/encnet_r50-d8_4xb4-80k_ade20k-512x512.py"]\n',
}
