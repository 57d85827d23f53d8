"""Write which strategy made the training rows into a ``Trainer``'s output folder and log."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_plugins.whole_files import write_json


class AutoDPReportCallback(TrainerCallback):
    """For trainings on rows that ``mmhf autodp apply`` wrote.

    Args:
        applied: Folder that apply wrote, or its ``applied.json``.

    Raises:
        FileNotFoundError: If there is no note of apply.
    """

    def __init__(self, applied: str | Path) -> None:
        path = Path(applied)
        path = path / "applied.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"no {path}; give the folder that `mmhf autodp apply` wrote.")
        self.note: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Copy the note beside the checkpoints."""
        if state.is_world_process_zero and args.output_dir:
            write_json(Path(args.output_dir) / "autodp.json", self.note)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the strategy and the number of its rows to each log line."""
        if logs is not None:
            logs["autodp/rows"] = self.note["rows"]
            logs["autodp/steps"] = len(self.note["steps"])
