"""``make new-room`` writes a room that begins green."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.new_room import write_room

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Enough of the repository for the contract suite to run on."""
    for name in ("tests/contract", "tools", "hf_plugins", "docs", "mm_plugins/__init__.py", "pyproject.toml"):
        source, target = ROOT / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for name in ("tests/__init__.py", "tests/hf_plugins/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    return tmp_path


@pytest.mark.host
def test_new_room_passes_the_contract_and_its_own_tests(copy: Path) -> None:
    write_room("hf_plugins", "toy_method", copy)
    subprocess.run([sys.executable, "tools/make_docs.py"], cwd=copy, check=True, capture_output=True)
    chosen = ["-k", "toy_method or toy", "tests/contract", "tests/hf_plugins/toy_method"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen],
        cwd=copy,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(copy), "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "failed" not in done.stdout


def test_existing_room_is_left_alone(copy: Path) -> None:
    written = write_room("mm_plugins", "toy", copy)
    before = {path: (copy / path).read_text() for path in written}
    with pytest.raises(FileExistsError, match="choose another NAME"):
        write_room("mm_plugins", "toy", copy)
    assert before == {path: (copy / path).read_text() for path in written}


@pytest.mark.parametrize(
    ("package", "name"), [("tools", "x"), ("hf_plugins", "My-Method"), ("hf_plugins", "class")]
)
def test_impossible_names_are_refused(package: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="PKG must be one of|NAME must be a Python module name"):
        write_room(package, name, tmp_path)
