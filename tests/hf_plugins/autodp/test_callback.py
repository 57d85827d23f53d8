import json
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_plugins.autodp.callback import AutoDPReportCallback

NOTE = {"strategy": ["clean"], "key": "k", "rows": 7, "steps": [{"step": "clean"}], "fingerprint": "f"}


def test_the_note_lies_beside_the_checkpoints_and_in_the_log(tmp_path: Path) -> None:
    (tmp_path / "applied.json").write_text(json.dumps(NOTE))
    callback = AutoDPReportCallback(tmp_path)
    arguments = TrainingArguments(output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True)
    callback.on_train_begin(arguments, TrainerState(), TrainerControl())
    assert json.loads((tmp_path / "out" / "autodp.json").read_text()) == NOTE
    logs = {"loss": 1.0}
    callback.on_log(arguments, TrainerState(), TrainerControl(), logs)
    assert logs == {"loss": 1.0, "autodp/rows": 7, "autodp/steps": 1}
    other = TrainerState(is_world_process_zero=False)
    (tmp_path / "out" / "autodp.json").unlink()
    callback.on_train_begin(arguments, other, TrainerControl())
    assert not (tmp_path / "out" / "autodp.json").exists()


def test_without_a_note(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="give the folder that `mmhf autodp apply` wrote"):
        AutoDPReportCallback(tmp_path)
