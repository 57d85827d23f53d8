"""Broken files against every command line: a line that says what is wrong, exit code 2, nothing written."""

import os
import shlex
from pathlib import Path

import pytest

from tests.pressure.corpus import KINDS, exit_code

# module, command with GOOD files, OUT, and one {kind} that is broken in every way of the corpus.
COMMANDS = [
    ("hf_plugins.gradpruner", "run --config {yaml} --output_dir OUT"),
    ("hf_plugins.gradpruner", "score --config {yaml} --output_dir OUT"),
    ("hf_plugins.gradpruner", "apply --model {model} --method magnitude --n_prune 1 --output_dir OUT"),
    ("hf_plugins.gradpruner", "apply --model good_model --scores {model} --n_prune 1 --output_dir OUT"),
    ("hf_plugins.fapm", "{model} good_model OUT"),
    ("hf_plugins.fapm", "good_model {model} OUT"),
    ("hf_plugins.fapm", "add good_model {model} OUT"),
    ("hf_plugins.fapm", "prune --config {yaml}"),
    ("hf_plugins.dp", "run {yaml}"),
    ("hf_plugins.dp", "audit --scores {json} --claimed-epsilon 1"),
    ("hf_plugins.dpnas", "train {yaml}"),
    ("hf_plugins.dpnas", "search {model} OUT"),
    ("hf_plugins.tee_split", "serve {yaml}"),
    ("hf_plugins.tee_split", "train {yaml} --data good.jsonl --out OUT"),
    ("hf_plugins.tee_split", "verify {model}"),
    ("hf_plugins.embed_parrot", "{model} --data good.txt --out OUT"),
    ("hf_plugins.embed_parrot", "good_model --data {text} --out OUT"),
    ("hf_plugins.embed_parrot", "train {file} --layer 1 --out OUT"),
    ("hf_plugins.dp_fedavg", "run {yaml} --output-dir OUT"),
    ("hf_plugins.dp_fedavg", "epsilon {yaml}"),
    ("hf_plugins.hpn", "search {yaml} --output-dir OUT"),
    ("hf_plugins.hpn", "deploy {model}"),
    ("hf_plugins.dpf_cm", "run {yaml}"),
    ("hf_plugins.dpf_cm", "ppvd search {model} --samples good.jsonl --out OUT"),
    ("hf_plugins.dpf_cm", "ppvd search good_model --samples {text} --out OUT"),
    ("hf_plugins.autodp", "search {text} --model good_model --out OUT"),
    ("hf_plugins.autodp", "search good.jsonl --config {yaml} --out OUT"),
    ("hf_plugins.autodp", "apply {yaml} good.jsonl --out OUT"),
    ("mm_plugins.spatialflow", "check {json} good_model"),
    ("mm_plugins.spatialflow", "mend {json} good_model OUT"),
    ("mm_plugins.spatialflow", "convert {file} OUT --config missing.py"),
    ("mm_plugins.pkd", "inspect {file}.py"),
    ("mm_plugins.pkd", "export {file} OUT"),
    ("mm_plugins.lau", "picture {file}.py {file} good.txt OUT"),
]
# FAPM looks at tensors alone: a folder whose config.json is wrong is as good to it as any other.
FINE = {
    ("hf_plugins.fapm", "no_config"),
    ("hf_plugins.fapm", "unknown_type"),
    ("hf_plugins.fapm", "cut_config"),
}
CASES = [
    pytest.param(module, command, kind, way, id=f"{module.split('.')[1]}-{command.split()[0]}-{kind}-{way}")
    for module, command in COMMANDS
    for kind in KINDS
    if "{" + kind + "}" in command
    for way in KINDS[kind]
    if (module, way) not in FINE
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and texts that are in order."""
    from tests.hf_plugins.tiny_models import llama

    folder = tmp_path_factory.mktemp("good")
    llama(2).save_pretrained(folder / "good_model")
    (folder / "good.txt").write_text("one text\nanother text\n", encoding="utf-8")
    (folder / "good.jsonl").write_text('{"input_ids": [3, 4, 5]}\n', encoding="utf-8")
    return folder


@pytest.mark.host
@pytest.mark.parametrize(("module", "command", "kind", "way"), CASES)
def test_broken_input_is_told_in_one_line(
    module: str, command: str, kind: str, way: str, good: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for entry in good.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    KINDS[kind][way](tmp_path / "bad \u00e9 input")
    arguments = [
        word.replace("{" + kind + "}", "bad \u00e9 input").replace("{file}", "missing")
        for word in shlex.split(command)
    ]
    before = set(os.listdir(tmp_path))
    code = exit_code(module, arguments)
    said = capfd.readouterr().err
    assert code == 2, f"exit code {code}; said: {said[-1500:]}"
    assert "Traceback" not in said
    assert said.strip(), "nothing was said"
    assert set(os.listdir(tmp_path)) - before <= {"runs"}, "something was written"
