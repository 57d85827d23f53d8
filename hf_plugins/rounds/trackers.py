"""Per-round metrics to any tracker that transformers knows: tensorboard, wandb, mlflow, ..."""

from collections.abc import Sequence
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks


class Reporter:
    """``on_round`` of the round engine: hands each row to the trackers' own callbacks.

    Args:
        report_to: Names as in ``TrainingArguments``.
        output_dir: Folder of the run.

    Raises:
        ValueError: If a name is unknown (transformers' message lists the known ones).
        ImportError: If a tracker's package is missing (the host says which).
    """

    def __init__(self, report_to: Sequence[str], output_dir: str) -> None:
        self.callbacks = [make() for make in get_reporting_integration_callbacks(list(report_to))]
        self.arguments = TrainingArguments(output_dir=output_dir, report_to=[])
        self.state, self.control = TrainerState(), TrainerControl()
        self._send("on_train_begin")

    def __call__(self, row: dict[str, Any]) -> None:
        """Log one round; ``row["round"]`` is the step."""
        self.state.global_step = int(row["round"])
        self._send("on_log", logs={name: value for name, value in row.items() if name != "round"})

    def close(self) -> None:
        """End of the run."""
        self._send("on_train_end")

    def _send(self, event: str, **more: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self.arguments, self.state, self.control, model=None, **more)
