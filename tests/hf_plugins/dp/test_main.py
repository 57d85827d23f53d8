"""The command line: figures of the accountant, audits with an exit code, recipes."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_plugins.accounting import epsilon
from hf_plugins.dp.__main__ import main
from tests.hf_plugins.dp import tiny
from tests.hf_plugins.dp.words import tokenizer

pytestmark = pytest.mark.host


def _out(capsys: pytest.CaptureFixture) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_epsilon_is_the_accountants(capsys: pytest.CaptureFixture) -> None:
    words = "epsilon --noise-multiplier 1.1 --sample-rate 0.01 --num-steps 100 --delta 1e-5".split()
    assert main(words) == 0
    found = _out(capsys)
    assert found["epsilon"] == epsilon(noise_multiplier=1.1, sample_rate=0.01, num_steps=100, delta=1e-5)
    assert found["sampling"] == "poisson"
    assert main([*words, "--accountant", "rdp"]) == 0
    assert _out(capsys)["epsilon"] > found["epsilon"]
    assert main(["epsilon", "--noise-multiplier", "0", "--num-steps", "1", "--delta", "1e-5"]) == 0
    assert _out(capsys)["epsilon"] == "inf"


def test_noise_keeps_its_budget(capsys: pytest.CaptureFixture) -> None:
    words = "noise --target-epsilon 2 --sample-rate 0.05 --num-steps 50 --delta 1e-5".split()
    assert main(words) == 0
    noise = _out(capsys)["noise_multiplier"]
    spent = {"sample_rate": 0.05, "num_steps": 50, "delta": 1e-5}
    assert epsilon(noise_multiplier=noise, **spent) <= 2 < epsilon(noise_multiplier=noise - 2e-3, **spent)


def test_audit_tells_by_exit_code(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert main("audit --noise-multiplier 2 --num-steps 2 --num-canaries 300".split()) == 0
    found = _out(capsys)
    assert found["refuted"] is False
    assert found["epsilon_lower_bound"] < found["claimed_epsilon"]
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"scores": list(range(300)), "included": [i >= 150 for i in range(300)]}))
    assert main(["audit", "--scores", str(path), "--claimed-epsilon", "0.5"]) == 1
    assert _out(capsys)["refuted"] is True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["audit", "--scores", "x.json"], "--scores needs --claimed-epsilon"),
        (["run", "nowhere.yaml"], "does not exist; configs/ holds some to start from"),
        (
            ["epsilon", "--noise-multiplier", "-1", "--num-steps", "1", "--delta", "1e-5"],
            "must be a finite number",
        ),
    ],
)
def test_wrong_use_is_said_and_returns_two(
    words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 2])
def test_recipe_trains_saves_and_reports(rank: int, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tiny.bert().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"text": f"w{3 + i % 9} w{4 + i % 5}", "label": i % 2} for i in range(20)]
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    recipe = {
        "model": str(tmp_path / "model"),
        "train_file": str(tmp_path / "train.jsonl"),
        "eval_file": str(tmp_path / "eval.jsonl"),
        "max_length": 6,
        "lora_rank": rank,
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "use_cpu": True,
        "report_to": [],
        "dp": {"noise_multiplier": 1.0, "delta": 0.01},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["run", str(tmp_path / "recipe.yaml")]) == 0
    found = _out(capsys)
    assert found["epsilon"] == epsilon(noise_multiplier=1.0, sample_rate=0.2, num_steps=2, delta=0.01)
    assert found["eval_loss"] > 0
    assert (tmp_path / "out" / "privacy.json").is_file()
    assert (tmp_path / "out" / ("adapter_config.json" if rank else "model.safetensors")).is_file()
