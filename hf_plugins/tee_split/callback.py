"""Callbacks of the server's Trainer: sealed checkpoints instead of plain ones, progress, and the label that
says what protects the run."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_plugins.tee_split.peft import spf_tensors
from hf_plugins.tee_split.storage import SealedStore, folder_tensors, remove_folder

logger = logging.getLogger(__name__)


class SealCheckpoints(TrainerCallback):
    """Seals each checkpoint that the Trainer wrote into enclave memory, and removes the plain one.

    Args:
        store: Where sealed checkpoints go; the newest replaces the one before.
        label: What protects the run; kept in every checkpoint.
    """

    def __init__(self, store: SealedStore, label: str) -> None:
        self.store, self.label = store, label

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Seal ``checkpoint-STEP``."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        # Every rank writes its random state into the folder.
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            tensors = {f"files/{name}": tensor for name, tensor in folder_tensors(folder).items()}
            tensors |= {f"spf/{name}": tensor for name, tensor in spf_tensors(kwargs["model"]).items()}
            self.store.write("checkpoint", {"step": state.global_step, "label": self.label}, tensors)
            remove_folder(folder)
            logger.info("[%s] checkpoint of step %d sealed", self.label, state.global_step)
        PartialState().wait_for_everyone()
        return control


class ReportProgress(TrainerCallback):
    """Tells the server's sessions how far training is, and marks the Trainer's logs.

    Args:
        report: Called with step, number of steps and the last logged loss.
        provider: Kind of evidence.
        hardware: Whether hardware stands behind it.
    """

    def __init__(self, report: Callable[..., None], *, provider: str, hardware: bool) -> None:
        self.report, self.provider, self.hardware = report, provider, hardware

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Pass the step on."""
        self.report(step=state.global_step, num_steps=state.max_steps)
        return control

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Pass the loss on and mark the record."""
        logs = kwargs.get("logs") or {}
        logs["tee_split/provider"], logs["tee_split/hardware"] = self.provider, self.hardware
        if "loss" in logs:
            self.report(loss=float(logs["loss"]))
        return control
