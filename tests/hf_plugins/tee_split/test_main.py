"""The commands, as typed: keys, a check of a model, server and client as processes with recipes, the demo."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_plugins.tee_split.__main__ import main
from tests.hf_plugins.tee_split.tiny import rows, saved_model

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def recipes(tmp_path: Path, capsys: pytest.CaptureFixture) -> dict[str, Path]:
    """Model, data, keys, and the two recipes of configs/tee_split with this test's paths."""
    saved_model(tmp_path / "model")
    assert main(["keygen", "alice", str(tmp_path / "alice.pem")]) == 0
    (tmp_path / "clients.json").write_text(capsys.readouterr().out)
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows()))
    paths = {
        "serve": {
            "model": "model",
            "store": "store",
            "clients": "clients.json",
            "sealing_key": "sealing.key",
        },
        "client": {"model": "model", "key_file": "alice.pem"},
    }
    for name, changes in paths.items():
        recipe = yaml.safe_load((ROOT / "configs" / "tee_split" / f"{name}_simulated.yaml").read_text())
        recipe |= {key: str(tmp_path / value) for key, value in changes.items()} | {"cut": 2}
        recipe |= {"port": 0} if name == "serve" else {"name": "alice"}
        recipe |= {"per_device_train_batch_size": 4, "num_train_epochs": 1} if name == "serve" else {}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return {name: tmp_path / f"{name}.yaml" for name in paths} | {
        "data": tmp_path / "data.jsonl",
        "out": tmp_path / "out",
    }


def serve(recipe: Path, *launcher: str) -> tuple[subprocess.Popen, int]:
    command = [sys.executable, *launcher, "-m", "hf_plugins.tee_split", "serve", str(recipe)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    for line in process.stdout:
        if "listening" in line:
            return process, json.loads(line)["listening"]
    raise AssertionError(process.wait())


def with_port(recipe: Path, port: int) -> str:
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"port": port}))
    return str(recipe)


@pytest.mark.host
def test_serve_encode_train_fetch(recipes: dict[str, Path]) -> None:
    process, port = serve(recipes["serve"])
    client, data = with_port(recipes["client"], port), ["--data", str(recipes["data"])]
    assert main(["encode", client, *data]) == 0
    assert main(["train", client, *data, "--out", str(recipes["out"])]) == 0
    assert (recipes["out"] / "adapter_model.safetensors").is_file()
    assert "SIMULATED - NO HARDWARE PROTECTION" in (recipes["out"] / "README.md").read_text()
    assert process.wait(timeout=60) == 0


@pytest.mark.slow
def test_two_ranks_train_one_tail(recipes: dict[str, Path], tmp_path: Path) -> None:
    recipe = yaml.safe_load(recipes["serve"].read_text()) | {"scratch": str(tmp_path / "scratch")}
    recipes["serve"].write_text(yaml.safe_dump(recipe))
    launcher = [
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "-m",
    ]
    command = [sys.executable, *launcher, "hf_plugins.tee_split", "serve", str(recipes["serve"])]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    port = next(json.loads(line)["listening"] for line in process.stdout if '"listening"' in line)
    client = with_port(recipes["client"], port)
    assert main(["train", client, "--data", str(recipes["data"]), "--out", str(recipes["out"])]) == 0
    assert process.wait(timeout=120) == 0
    assert (recipes["out"] / "adapter_model.safetensors").is_file()


def test_keygen_writes_a_private_file_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "bob.pem"
    assert main(["keygen", "bob", str(path)]) == 0
    assert len(json.loads(capsys.readouterr().out)["bob"]["public_key"]) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert main(["keygen", "bob", str(path)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["keygen", "b/ob", str(tmp_path / "x")]) == 2
    assert "a client's name has letters and digits" in capsys.readouterr().err


def test_verify_says_bit_equal(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    saved_model(tmp_path)
    assert main(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"k={k}: bit-equal" for k in (1, 2, 3)]


def test_verify_finds_a_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_model(tmp_path, "gpt2")
    monkeypatch.setattr("hf_plugins.tee_split.model.ZeroPositions", lambda embedding: embedding)
    assert main(["verify", str(tmp_path)]) == 1
    assert "k=1: differs by" in capsys.readouterr().out


def test_wrong_use_is_told(recipes: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    client = with_port(recipes["client"], 1)
    assert main(["train", client]) == 2
    assert "name a JSON-lines file with --data" in capsys.readouterr().err
    changed = yaml.safe_load(Path(client).read_text()) | {"num_retries": 0}
    Path(client).write_text(yaml.safe_dump(changed))
    assert main(["fetch", client]) == 1
    assert "gave up after 0 attempts" in capsys.readouterr().err
    Path(client).write_text(yaml.safe_dump(changed | {"mode": "bidirectional"}))
    assert main(["train", client, "--data", str(recipes["data"])]) == 2
    assert "use SplitTrainer(front=...) in Python" in capsys.readouterr().err
    Path(client).write_text(yaml.safe_dump(changed | {"cut": 0}))
    assert main(["fetch", client]) == 2
    assert "cut must be at least 1" in capsys.readouterr().err
