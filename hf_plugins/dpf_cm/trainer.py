"""Training stages through trl: continued pre-training, SFT, reward models, DPO; each resumable."""

import copy
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from hf_plugins.data_ops.op import canonical, content_key, digest
from hf_plugins.data_ops.perplexity import model_hash
from hf_plugins.dpf_cm.dataset import pair_rows, sft_rows
from hf_plugins.whole_files import write_json

logger = logging.getLogger(__name__)

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The paper names neither learning rates nor epochs; these are usual for models of its size.
DEFAULTS: dict[str, dict[str, Any]] = {
    # trl's own strategy "bfd" cuts off what does not fit; "wrapped" loses no token.
    "cpt": {"learning_rate": 1e-5, "num_train_epochs": 1, "packing": True, "packing_strategy": "wrapped"},
    "sft": {"learning_rate": 1e-5, "num_train_epochs": 3},
    "rm": {"learning_rate": 1e-5, "num_train_epochs": 1, "center_rewards_coefficient": 0.01},
    "dpo": {"learning_rate": 5e-7, "num_train_epochs": 1, "beta": 0.1},
}
_COMMON: dict[str, Any] = {
    "max_length": 2048,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "logging_steps": 10,
    "save_total_limit": 1,
    "report_to": "none",
}


def stage_options(stage: str, given: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Options of a stage's trl config: defaults of the method, then the recipe's.

    Raises:
        ValueError: If trl's config knows no such option.
    """
    kind = {"cpt": SFTConfig, "sft": SFTConfig, "rm": RewardConfig, "dpo": DPOConfig}[stage]
    known = set(kind.__dataclass_fields__)
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(
            f"{stage}: {kind.__name__} has no option {', '.join(unknown)}; see trl's documentation."
        )
    cuda = torch.cuda.is_available()
    machine = {
        "bf16": cuda and torch.cuda.is_bf16_supported(),
        "use_cpu": not cuda,
        "gradient_checkpointing": cuda,
    }
    return {**_COMMON, **machine, **DEFAULTS[stage], "seed": seed, **given}


def small_model(texts: Sequence[str], folder: str | Path, sizes: Mapping[str, int], seed: int) -> Path:
    """A small Qwen2 with fresh weights and a byte-level tokenizer learnt on the texts, saved in a folder.

    Raises:
        ValueError: If a size is unknown.
    """
    sizes = {"hidden_size": 128, "num_layers": 4, "vocabulary": 3000, "max_positions": 2048} | dict(sizes)
    unknown = sorted(set(sizes) - {"hidden_size", "num_layers", "vocabulary", "max_positions"})
    if unknown:
        raise ValueError(
            f"init_model has no {', '.join(unknown)}; it takes hidden_size, num_layers, vocabulary, "
            "max_positions."
        )
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return folder
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=sizes["vocabulary"],
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHAT
    set_seed(seed)
    hidden = sizes["hidden_size"]
    heads = max(1, hidden // 32)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2) if heads % 2 == 0 else heads,
        max_position_embeddings=sizes["max_positions"],
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    aside = folder.with_name(folder.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    Qwen2ForCausalLM(config).save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    folder.parent.mkdir(parents=True, exist_ok=True)
    os.rename(aside, folder)
    return folder


def _stage(
    stage: str,
    models_dir: str | Path,
    parts: Sequence[str],
    make: Callable[[Path], Any],
    tokenizer: Any,
) -> Path:
    """Train into ``STAGE-KEY/`` unless it lies there; the key hashes data, options and base model."""
    folder = Path(models_dir) / f"{stage}-{digest(stage, *parts)[:12]}"
    if (folder / "stage.json").is_file():
        logger.info("%s: finished already in %s", stage, folder)
        return folder
    checkpoints = folder / "checkpoints"
    trainer = make(checkpoints)
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(str(folder))
    if trainer.accelerator.is_main_process:
        tokenizer.save_pretrained(folder)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        record = {"steps": trainer.state.global_step, "losses": losses, "resumed": last is not None}
        write_json(folder / "stage.json", record)
        shutil.rmtree(checkpoints, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return folder


def _load(base: str | Path) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(str(base)), tokenizer


def train_cpt(
    base: str | Path, dataset: Dataset, models_dir: str | Path, options: Mapping[str, Any], *, seed: int = 0
) -> Path:
    """Continue pre-training on the column ``text``.

    Args:
        base: Folder of the base model.
        dataset: Texts.
        models_dir: Where the stage's folder goes.
        options: Options of `SFTConfig` beyond the defaults.
        seed: Of the order.

    Returns:
        The stage's folder.
    """
    chosen = stage_options("cpt", options, seed)
    model, tokenizer = _load(base)

    def make(folder: Path) -> Any:
        return SFTTrainer(
            model,
            args=SFTConfig(output_dir=str(folder), **chosen),
            train_dataset=dataset.select_columns(["text"]),
            processing_class=tokenizer,
        )

    return _stage(
        "cpt", models_dir, [model_hash(str(base)), canonical(chosen), content_key(dataset)], make, tokenizer
    )


def train_sft(
    base: str | Path, dataset: Dataset, models_dir: str | Path, options: Mapping[str, Any], *, seed: int = 0
) -> Path:
    """Fine-tune on dialogues; the loss counts answers only.

    Args:
        base: Folder of the base (or CPT) model.
        dataset: Columns ``question``, ``answer``, ``history``, perhaps ``instruction``.
        models_dir: Where the stage's folder goes.
        options: Options of `SFTConfig` beyond the defaults.
        seed: Of the order.

    Returns:
        The stage's folder.
    """
    chosen = stage_options("sft", options, seed)
    model, tokenizer = _load(base)

    def make(folder: Path) -> Any:
        return SFTTrainer(
            model,
            args=SFTConfig(output_dir=str(folder), **chosen),
            train_dataset=sft_rows(dataset),
            processing_class=tokenizer,
        )

    return _stage(
        "sft", models_dir, [model_hash(str(base)), canonical(chosen), content_key(dataset)], make, tokenizer
    )


def folds(dataset: Dataset, count: int) -> np.ndarray:
    """Fold of each row by the hash of its id: equal sizes up to one, whatever the order of rows."""
    ranks = np.argsort(
        np.argsort([digest("fold", name) for name in dataset["row_id"]], kind="stable"), kind="stable"
    )
    return ranks % count


def train_reward_models(
    sft: str | Path,
    dataset: Dataset,
    models_dir: str | Path,
    options: Mapping[str, Any],
    *,
    count: int = 5,
    cross_fit: bool = True,
    seed: int = 0,
) -> tuple[list[Path], np.ndarray]:
    """Train reward models from the SFT model and score all pairs.

    Args:
        sft: Folder of the SFT model; the score head is fresh for each seed.
        dataset: Columns ``prompt``, ``chosen``, ``rejected``, ``row_id``.
        models_dir: Where the stages' folders go.
        options: Options of `RewardConfig` beyond the defaults.
        count: Number of models N.
        cross_fit: Model k does not train on fold k and scores only it; off all models train on and score all
            pairs (the paper).
        seed: Of the first model; the others follow.

    Returns:
        Folders, and margins (rows, count), NaN where a model does not score.
    """
    fold = folds(dataset, count)
    margins = np.full((len(dataset), count), np.nan)
    folders = []
    for number in range(count):
        chosen = stage_options("rm", options, seed + number)
        train = dataset.select(np.nonzero(fold != number)[0]) if cross_fit else dataset
        tokenizer = AutoTokenizer.from_pretrained(str(sft))

        def make(
            folder: Path,
            train: Dataset = train,
            chosen: Mapping[str, Any] = chosen,
            tokenizer: Any = tokenizer,
            number: int = number,
        ) -> Any:
            # Before the model is built: the score head is drawn here.
            set_seed(seed + number)
            model = AutoModelForSequenceClassification.from_pretrained(str(sft), num_labels=1)
            model.config.pad_token_id = tokenizer.pad_token_id
            return RewardTrainer(
                model,
                args=RewardConfig(output_dir=str(folder), **chosen),
                train_dataset=pair_rows(train),
                processing_class=tokenizer,
            )

        parts = [model_hash(str(sft)), canonical(chosen), content_key(train), str(number)]
        folder = _stage(f"rm{number}", models_dir, parts, make, tokenizer)
        scored = np.nonzero(fold == number)[0] if cross_fit else np.arange(len(dataset))
        model = AutoModelForSequenceClassification.from_pretrained(str(folder), num_labels=1).eval()
        rows = dataset.select(scored)
        max_length = chosen["max_length"]
        margins[scored, number] = reward(model, tokenizer, rows, "chosen", max_length) - reward(
            model, tokenizer, rows, "rejected", max_length
        )
        folders.append(folder)
    return folders, margins


@torch.no_grad()
def reward(
    model: Any, tokenizer: Any, dataset: Dataset, column: str, max_length: int, *, batch_size: int = 16
) -> np.ndarray:
    """Reward of each row's response in a column, float64 (rows,)."""
    if torch.cuda.is_available():
        model = model.cuda()
    rows = pair_rows(dataset)
    texts = [tokenizer.apply_chat_template([*row["prompt"], *row[column]], tokenize=False) for row in rows]
    found = np.zeros(len(texts))
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        inputs = tokenizer(
            [texts[i] for i in batch],
            return_tensors="pt",
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=max_length,
            add_special_tokens=False,
        ).to(model.device)
        inputs.pop("token_type_ids", None)
        found[batch] = model(**inputs).logits[:, 0].double().cpu().numpy()
    return found


def train_dpo(
    sft: str | Path, dataset: Dataset, models_dir: str | Path, options: Mapping[str, Any], *, seed: int = 0
) -> Path:
    """Optimise preferences from the SFT model, with a frozen copy of it as the reference.

    Args:
        sft: Folder of the SFT model.
        dataset: Columns ``prompt``, ``chosen``, ``rejected``.
        models_dir: Where the stage's folder goes.
        options: Options of `DPOConfig` beyond the defaults.
        seed: Of the order.

    Returns:
        The stage's folder.
    """
    chosen = stage_options("dpo", options, seed)
    model, tokenizer = _load(sft)

    def make(folder: Path) -> Any:
        return DPOTrainer(
            model,
            # Without it trl loads the reference by the config's name: the base model, not the SFT model.
            ref_model=copy.deepcopy(model),
            args=DPOConfig(output_dir=str(folder), **chosen),
            train_dataset=pair_rows(dataset),
            processing_class=tokenizer,
        )

    return _stage(
        "dpo", models_dir, [model_hash(str(sft)), canonical(chosen), content_key(dataset)], make, tokenizer
    )
