"""``mmhf gradpruner score | apply | run``, called as a user would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_plugins.cli import main as mmhf
from hf_plugins.gradpruner.__main__ import main
from hf_plugins.gradpruner.plan import PruningPlan
from tests.contract.rooms import ROOT
from tests.hf_plugins.gradpruner.folders import causal_folder, classifier_folder, write_rows

pytestmark = pytest.mark.host
COMMON = {
    "num_steps": 4,
    "score_learning_rate": 1e-2,
    "lora_r": 2,
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "max_length": 8,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def recipe(path: Path, **options: object) -> str:
    path.write_text(yaml.safe_dump(COMMON | options))
    return str(path)


def test_score_then_apply(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A causal model through SFTTrainer; one scoring run serves several plans."""
    model, data = causal_folder(tmp_path / "long"), write_rows(tmp_path / "rows.jsonl")
    config = recipe(tmp_path / "r.yaml", model=str(model), train_file=str(data), n_prune=2, n_merge="1")
    assert mmhf(["gradpruner", "score", "--config", config, "--output_dir", str(tmp_path / "scores")]) == 0
    assert "dropped layers: [" in capsys.readouterr().out
    plan = json.loads((tmp_path / "scores" / "plan.json").read_text())
    assert plan["steps"] == {"scored": 4, "zero": 1, "skipped": 0}
    assert len(plan["stability"]["drop_frequency"]) == 6
    assert (tmp_path / "scores" / "scores.svg").read_text().startswith("<svg")
    base = ["apply", "--model", str(model), "--scores", str(tmp_path / "scores")]
    for n, merge in ((2, "1"), (3, "all")):
        out = tmp_path / f"short{n}"
        assert main([*base, "--output_dir", str(out), "--n_prune", str(n), "--n_merge", merge]) == 0
        short = AutoModelForCausalLM.from_pretrained(out)
        assert len(short.model.layers) == short.config.num_hidden_layers == 6 - n
        note = json.loads((out / "gradpruner.json").read_text())
        assert len(note["plan"]["merged"]) == (1 if merge == "1" else n)
    assert note["options"]["keep"] == 0.2
    first = json.loads((tmp_path / "short2" / "gradpruner.json").read_text())
    assert PruningPlan.from_dict(first["plan"]) == PruningPlan.from_dict(plan["plan"])
    assert main([*base, "--output_dir", str(tmp_path / "short2"), "--n_prune", "2"]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["reverse", "random", "magnitude", "block_influence", "laco"])
def test_apply_a_baseline(method: str, tmp_path: Path) -> None:
    model, data = causal_folder(tmp_path / "long"), write_rows(tmp_path / "rows.jsonl")
    words = ["apply", "--model", str(model), "--method", method, "--n_prune", "2", "--train_file", str(data)]
    assert (
        main([*words, "--output_dir", str(tmp_path / "short"), "--calibration_rows", "4", "--bf16", "false"])
        == 0
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "short").config.num_hidden_layers == 4
    assert json.loads((tmp_path / "short" / "gradpruner.json").read_text())["plan"]["method"] == method


@pytest.mark.parametrize("history", ["disk", "scores"])
def test_run_a_classifier(history: str, tmp_path: Path) -> None:
    """Score, merge, drop, fine-tune, evaluate, save; twice into one folder."""
    model, data = classifier_folder(tmp_path / "long"), write_rows(tmp_path / "rows.jsonl")
    config = recipe(
        tmp_path / "r.yaml",
        model=str(model),
        train_file=str(data),
        eval_file=str(data),
        label_column="label",
        learning_rate=1e-3,
        n_prune=2,
        n_merge="1",
        history=history,
        output_dir=str(tmp_path / "out"),
    )
    words = ["run", "--config", config]
    assert main(words) == 0
    if history == "disk":
        assert main(words) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert 0.0 <= metrics["eval_accuracy"] <= 1.0
    final = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "final")
    assert final.config.num_hidden_layers == 4
    assert final.config.num_labels == 2
    notes = [
        json.loads((tmp_path / "out" / part / "gradpruner.json").read_text()) for part in ("model", "final")
    ]
    assert notes[0] == notes[1]
    assert notes[0]["plan"]["merged"]


@pytest.mark.slow
def test_run_on_two_processes(tmp_path: Path) -> None:
    """``accelerate launch`` over gloo: LoRA at the end, prompt and completion columns."""
    model, data = causal_folder(tmp_path / "long"), tmp_path / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({"q": f"w{i} w{i + 1}", "a": f"w{i + 2} w5"}) + "\n" for i in range(3, 67))
    )
    config = recipe(
        tmp_path / "r.yaml",
        model=str(model),
        train_file=str(data),
        text_column="a",
        prompt_column="q",
        n_prune=2,
        n_merge="1",
        finetune="lora",
        output_dir=str(tmp_path / "out"),
        max_steps=5,
    )
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
    ]
    command += ["1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["-m", "hf_plugins.gradpruner", "run", "--config", config]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "final" / "adapter_model.safetensors").is_file()
    assert "train_loss" in json.loads((tmp_path / "out" / "metrics.json").read_text())


def test_run_without_fine_tuning(tmp_path: Path) -> None:
    model, data = causal_folder(tmp_path / "long"), write_rows(tmp_path / "rows.jsonl")
    config = recipe(tmp_path / "r.yaml", model=str(model), train_file=str(data), ratio=0.34, finetune="none")
    assert main(["run", "--config", config, "--output_dir", str(tmp_path / "out")]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").config.num_hidden_layers == 4
    assert not (tmp_path / "out" / "final").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["score", "--model", "m", "--method", "random"], "needs no scoring run; use `apply` or `run`"),
        (["apply", "--model", "m"], "scores is not set; name the folder"),
        (["apply", "--model", "m", "--scores", "nowhere"], "run `mmhf gradpruner score` first"),
        (["score", "--model", "m"], "train_file is not set"),
        (["score", "--model", "m", "--keep", "20"], "write 0.2 for 20 %"),
        (["score", "--model", "package:nowhere_at_all/x"], "Install it, or name a folder"),
    ],
)
def test_errors_are_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--output_dir", str(tmp_path), "--bf16", "false"]) == 2
    assert message in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert "shorten the checkpoint" in out
    with pytest.raises(SystemExit):
        main(["frobnicate"])


def test_recipes_name_options_that_exist() -> None:
    """Every recipe parses (a misspelt key is an error of the parser)."""
    from trl import SFTConfig, TrlParser

    from hf_plugins.gradpruner.config import GradPrunerConfig, RunConfig

    for path in sorted((ROOT / "configs" / "gradpruner").glob("*.yaml")):
        run, config, args = TrlParser((RunConfig, GradPrunerConfig, SFTConfig)).parse_args_and_config(
            ["--config", str(path), "--bf16", "false"], fail_with_unknown_args=True
        )
        assert run.model
        assert args.output_dir
        assert config.num_steps > 0
