"""Data-Juicer's own operators, run by its command in an environment of its own."""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml
from datasets import Dataset

from hf_plugins.data_ops.op import ROW_ID, DataOp, OpContext, digest, register

PYTHON = "HFP_DATAJUICER_PYTHON"


@register
@dataclass(frozen=True, kw_only=True)
class DataJuicerMapper(DataOp):
    """Runs a list of Data-Juicer operators out of process: JSON lines there and back.

    Data-Juicer installs packages at run time and pins what the rest of this suite needs newer, so it is never
    imported here. The environment variable ``HFP_DATAJUICER_PYTHON`` names the interpreter of its
    environment; its command ``dj-process`` stands beside that.
    """

    name: ClassVar[str] = "data_juicer_mapper"
    idempotent: ClassVar[bool] = False
    process: tuple[Mapping[str, Any] | str, ...]
    """Data-Juicer's own recipe: ``[{operator: {parameter: value}}, ...]``."""
    text_key: str = "text"
    num_proc: int = 1
    timeout: float = 3600.0

    def __post_init__(self) -> None:
        if not self.process:
            raise ValueError(f"{self.name}: process is empty; give Data-Juicer's operators as a list.")

    def _command(self) -> Path:
        python = os.environ.get(PYTHON, "")
        command = Path(python).with_name("dj-process") if python else Path()
        if not python or not command.is_file():
            raise FileNotFoundError(
                f"{self.name}: no dj-process beside {PYTHON}={python!r}; make an environment of its own "
                f"(python -m venv dj; dj/bin/pip install py-data-juicer) and set {PYTHON}=dj/bin/python."
            )
        return command

    def apply(self, dataset: Dataset, context: OpContext) -> Dataset:
        """Write, run, read; rows that did not come back are dropped, rows without an id are new."""
        command = self._command()
        with tempfile.TemporaryDirectory() as folder:
            given, found = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
            with given.open("w", encoding="utf-8") as file:
                for row in dataset:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            recipe = {
                "dataset_path": str(given),
                "export_path": str(found),
                "text_keys": self.text_key,
                "np": self.num_proc,
                "process": [spec if isinstance(spec, Mapping) else {spec: None} for spec in self.process],
            }
            (Path(folder) / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
            try:
                done = subprocess.run(
                    [str(command), "--config", str(Path(folder) / "recipe.yaml")],
                    capture_output=True,
                    text=True,
                    timeout=self.timeout,
                    cwd=folder,
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                raise RuntimeError(
                    f"{self.name}: dj-process did not end in {self.timeout:g} s; raise timeout."
                ) from error
            if done.returncode or not found.is_file():
                tail = (done.stderr or done.stdout).strip()[-400:]
                raise RuntimeError(f"{self.name}: dj-process failed with code {done.returncode}: {tail}")
            rows = [
                json.loads(line) for line in found.read_text(encoding="utf-8").split("\n") if line.strip()
            ]
        return self._account(dataset, rows, context)

    def _account(self, dataset: Dataset, rows: list[dict[str, Any]], context: OpContext) -> Dataset:
        before = {row[ROW_ID]: row for row in dataset}
        seen: set[str] = set()
        for number, row in enumerate(rows):
            if row.get(ROW_ID) not in before or row[ROW_ID] in seen:
                row[ROW_ID] = digest(self.name, str(number), json.dumps(row, sort_keys=True))[:20]
                context.ledger.add(self.name, row[ROW_ID], "added")
            elif any(row.get(name) != value for name, value in before[row[ROW_ID]].items()):
                context.ledger.add(self.name, row[ROW_ID], "changed")
            seen.add(row[ROW_ID])
        for name in before:
            if name not in seen:
                context.ledger.add(self.name, name, "dropped", "Data-Juicer did not hand the row back")
        columns = {name: [row.get(name) for row in rows] for name in dataset.column_names}
        return Dataset.from_dict(columns, features=dataset.features)
