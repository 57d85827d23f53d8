"""Train a parrot with the stock Trainer."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_plugins.embed_parrot.dataset import StatesCollator, StatesDataset
from hf_plugins.embed_parrot.inversion import RidgeInversion
from hf_plugins.embed_parrot.model import EmbedParrot, EmbedParrotConfig


def standardise_input(parrot: EmbedParrot, states: Sequence[Tensor]) -> None:
    """Fold the mean and spread of the states into the input adapter, so that it starts well scaled.

    The model stays the same function class; states of deep layers have a few entries a hundred times larger
    than the rest, which a fresh linear layer would take many steps to tame.

    Args:
        parrot: Its input adapter is changed in place.
        states: States that it will be trained on.
    """
    x = torch.cat(list(states)).float()
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    with torch.no_grad():
        parrot.adapter_in.weight.div_(std.to(parrot.device))
        parrot.adapter_in.bias.sub_(parrot.adapter_in.weight @ mean.to(parrot.device))


def parrot_trainer(
    parrot: EmbedParrot,
    states: Sequence[Tensor],
    ids: Sequence[Tensor],
    codebook: Tensor,
    arguments: TrainingArguments,
) -> Trainer:
    """A stock ``Trainer`` set up for a parrot.

    Args:
        parrot: The parrot.
        states: States of each text of public data.
        ids: Their tokens.
        codebook: Input embeddings of the attacked model.
        arguments: Of the Trainer.

    Returns:
        The Trainer; call its ``train``.
    """
    return Trainer(
        model=parrot.set_codebook(codebook),
        args=arguments,
        train_dataset=StatesDataset(states, ids),
        data_collator=StatesCollator(codebook),
    )


def train_parrot(
    config: EmbedParrotConfig,
    states: Sequence[Tensor],
    ids: Sequence[Tensor],
    codebook: Tensor,
    *,
    folder: Path,
    ridge: RidgeInversion | None = None,
    num_steps: int = 1000,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    seed: int = 0,
    use_cpu: bool = False,
    **arguments: Any,
) -> EmbedParrot:
    """Train a parrot of fresh weights, or go on from the last checkpoint in ``folder``.

    Args:
        config: Of the parrot.
        states: States of each text of public data, unpadded.
        ids: Their tokens.
        codebook: Input embeddings of the attacked model.
        folder: Where checkpoints lie; a finished parrot is loaded from there instead of trained.
        ridge: The solved linear map, where ``config.linear_skip`` is set.
        num_steps: Optimizer steps.
        batch_size: Texts in a step.
        learning_rate: Peak of the cosine schedule.
        seed: Of weights and order.
        use_cpu: Whether to leave a GPU alone.
        arguments: Further ``TrainingArguments``.

    Returns:
        The parrot in eval mode, knowing the codebook.
    """
    done = folder / "final"
    if (done / "config.json").is_file():
        return EmbedParrot.from_pretrained(done).set_codebook(codebook).eval()
    set_seed(seed)
    parrot = EmbedParrot(config)
    standardise_input(parrot, states)
    if ridge is not None and config.linear_skip and ridge.weight_DE is not None:
        parrot.start_from_ridge(ridge.weight_DE)
    settings: dict[str, Any] = {
        "max_steps": num_steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "logging_steps": max(1, num_steps // 20),
        "save_steps": max(1, num_steps // 4),
        "save_total_limit": 1,
        "report_to": [],
        "disable_tqdm": True,
        "seed": seed,
        "use_cpu": use_cpu,
        "dataloader_pin_memory": False,
    }
    trainer = parrot_trainer(
        parrot, states, ids, codebook, TrainingArguments(output_dir=str(folder), **(settings | arguments))
    )
    # Hundreds of lines of losses would hide the scan's own log; trainer_state.json has them.
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    trainer.save_model(str(done))
    if trainer.is_world_process_zero():
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    return parrot.eval()
