"""FAPM at the end of a training, or at every save of it, without touching the weights that train."""

import logging
import tempfile
from pathlib import Path
from typing import Any, Literal

from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from hf_plugins.fapm.config import FAPMConfig
from hf_plugins.fapm.model import fapm_prune_checkpoint

logger = logging.getLogger(__name__)
FOLDER = "fapm"


class FAPMCallback(TrainerCallback):
    """Write a pruned copy of what a `Trainer` (or trl `SFTTrainer`) saves.

    At a save the checkpoint on disk is pruned into ``checkpoint-N/fapm``; at the end the live weights, full
    model or LoRA adapter, into ``OUTPUT_DIR/fapm``. Only the first process works.
    """

    def __init__(
        self,
        base: str | Path,
        config: FAPMConfig | None = None,
        *,
        at: tuple[Literal["save", "end"], ...] = ("end",),
    ) -> None:
        """Prepare the callback.

        Args:
            base: Folder of the pre-trained model that the training started from.
            config: Options; None takes the paper's.
            at: When to prune: ``save``, ``end`` or both.

        Raises:
            ValueError: If ``at`` names no moment.
        """
        if not at or set(at) - {"save", "end"}:
            raise ValueError(f"at must name 'save', 'end' or both; got {at!r}.")
        self.base, self.config, self.at = Path(base), config or FAPMConfig(), tuple(at)
        self.reports: list[dict[str, Any]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse at once what would fail after the training.

        Raises:
            ValueError: If weights are sharded over processes, or the base folder is not there.
        """
        if args.deepspeed or args.fsdp:
            raise ValueError(
                "FAPMCallback needs whole weights, and DeepSpeed or FSDP shards them. Train without "
                "it, consolidate the checkpoint (`accelerate merge-weights`, zero_to_fp32.py) and run `mmhf "
                "fapm BASE FINETUNED OUT`."
            )
        if not (self.base / "config.json").is_file():
            raise ValueError(
                f"base must be the folder of the pre-trained model, with its config.json; got {self.base}. "
                "Save it first: AutoModelForCausalLM.from_pretrained(NAME).save_pretrained(FOLDER)."
            )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prune the checkpoint that was just written."""
        if "save" in self.at and state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self._prune(folder, folder / FOLDER)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prune the live weights, in the precision they were trained in."""
        if "end" not in self.at or not state.is_world_process_zero:
            return
        out = Path(args.output_dir) / FOLDER
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".fapm-") as folder:
            kwargs["model"].save_pretrained(folder)
            if kwargs.get("processing_class") is not None:
                kwargs["processing_class"].save_pretrained(folder)
            self._prune(Path(folder), out)

    def _prune(self, folder: Path, out: Path) -> None:
        report = fapm_prune_checkpoint(self.base, folder, out, self.config)
        self.reports.append(report)
        totals = report["totals"]
        logger.info("fapm/effective_density %.4f, written to %s", totals["effective_density"], out)
