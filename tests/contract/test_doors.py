"""Style guide (a), (g): every room has the same doors, a README, mirrored tests, a place in the index."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.rooms import ROOT, Room, label, rooms, tree

SECTIONS = [
    "What it does",
    "Run",
    "Options",
    "Results",
    "Departures from the paper",
    "Limits",
    "Source and licence",
]

each_room = pytest.mark.parametrize("room", rooms(), ids=label)


@each_room
def test_room_has_its_doors(room: Room) -> None:
    needed = ["__init__.py", "README.md"]
    if room.package == "hf_plugins":
        needed += ["config.py", "__main__.py"]
    missing = [name for name in needed if not (room.folder / name).is_file()]
    assert not missing, f"{room} lacks {missing}"
    assert room.cores(), f"{room} has no core file: the formulas of a paper live in one"
    assert room.adapters(), f"{room} has no adapter: nothing connects it to a host"


@each_room
def test_room_has_benchmark_configs_and_index_entry(room: Room) -> None:
    assert (ROOT / "benchmarks" / f"{room.name}.py").is_file()
    assert any((ROOT / "configs" / room.name).iterdir())
    index = (ROOT / "docs" / "paper_index.md").read_text(encoding="utf-8")
    assert index.count(f"{room.package}/{room.name}") >= 1, f"docs/paper_index.md has no entry of {room}"


@each_room
def test_readme_has_its_sections(room: Room) -> None:
    text = (room.folder / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", text, flags=re.M) == SECTIONS


@each_room
def test_public_names_are_few_and_sorted(room: Room) -> None:
    assigned = [
        ast.literal_eval(node.value)
        for node in tree(room.folder / "__init__.py").body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
    ]
    assert len(assigned) == 1, f"{room}/__init__.py must set __all__ once"
    names = assigned[0]
    assert names == sorted(names), f"sort __all__ of {room}"
    assert 1 <= len(names) <= 10, f"{room} exports {len(names)} names; 10 is the most a reader can hold"


@each_room
def test_tests_mirror_the_room(room: Room) -> None:
    missing = [
        f"test_{path.stem.strip('_')}.py"
        for path in room.files()
        if path.stem != "__init__" and not (room.tests / f"test_{path.stem.strip('_')}.py").is_file()
    ]
    assert not missing, f"{room.tests} lacks {missing}"
    assert (room.tests / "reference.py").is_file(), (
        f"{room.tests} lacks reference.py, the slow literal formula"
    )


def first_command(readme: Path) -> str:
    """The first line of the first shell block under "Run"."""
    run = readme.read_text(encoding="utf-8").split("## Run", 1)[1]
    block = re.search(r"```(?:bash|sh|console)\n(.+?)```", run, flags=re.S)
    assert block, f"{readme}: no shell block under 'Run'"
    return next(line for line in block.group(1).splitlines() if line.strip() and not line.startswith("#"))


@pytest.mark.host
@each_room
def test_readme_first_command_runs_in_a_minute(room: Room, tmp_path: Path) -> None:
    words = shlex.split(first_command(room.folder / "README.md"))
    if words[0] == "python":
        words[0] = sys.executable
    elif words[0] == "mmhf":
        words[:1] = [sys.executable, "-c", "from hf_plugins.cli import main; raise SystemExit(main())"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
