"""Style guide (a): arrows point one way, and a core knows no host."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.rooms import (
    CORE_LIBRARIES,
    PACKAGES,
    ROLES,
    ROOM_IMPORTS,
    ROOT,
    Room,
    imported_modules,
    label,
    rooms,
)

FREE = {"torch", "numpy", *sys.stdlib_module_names}


def _files(kind: str) -> list[tuple[Room, Path]]:
    return [(room, path) for room in rooms() for path in getattr(room, kind)()]


@pytest.mark.parametrize(("room", "core"), _files("cores"), ids=label)
def test_core_imports_only_tensors_and_core(room: Room, core: Path) -> None:
    siblings = {f"{room.package}.{room.name}.{path.stem}" for path in room.cores()}
    allowed = FREE | set(CORE_LIBRARIES.get(room.name, {}))
    alien = {
        name
        for name in imported_modules(core)
        if name.split(".")[0] not in allowed
        and not any(name == sibling or name.startswith(sibling + ".") for sibling in siblings)
        and name != f"{room.package}.{room.name}"
    }
    roles = ", ".join(sorted(ROLES[room.package]))
    assert not alien, (
        f"{core} imports {sorted(alien)}; only an adapter may, and its name says which host: {roles}"
    )


@pytest.mark.parametrize(("room", "path"), _files("files"), ids=label)
def test_no_room_imports_another_room(room: Room, path: Path) -> None:
    others = {other.name for other in rooms()} - {room.name} - ROOM_IMPORTS.get(room.name, set())
    foreign = {
        name
        for name in imported_modules(path)
        if name.split(".")[0] in PACKAGES and len(name.split(".")) > 1 and name.split(".")[1] in others
    }
    assert not foreign, (
        f"{path} imports another room: {sorted(foreign)}; move what both need to the package's root"
    )


@pytest.mark.parametrize(("room", "path"), _files("adapters"), ids=label)
def test_adapter_does_not_import_the_command(room: Room, path: Path) -> None:
    upward = {name for name in imported_modules(path) if name.endswith(".__main__")}
    assert not upward, f"{path} imports {sorted(upward)}; arrows point from the command to the adapter"


def _loaded(statement: str, names: tuple[str, ...]) -> str:
    code = f"{statement}; import sys; print([name for name in {names!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_hf_side_costs_nothing_to_import() -> None:
    hosts = (
        "torch",
        "numpy",
        "transformers",
        "peft",
        "accelerate",
        "trl",
        "datasets",
        "opacus",
        "flwr",
        "mmengine",
    )
    assert _loaded("import hf_plugins", hosts) == "[]"


def test_mm_side_needs_no_hugging_face() -> None:
    """mmdet imports transformers where it is installed; ours must import without it as well."""
    names = ("transformers", "peft", "accelerate", "trl", "opacus", "flwr")
    blocked = f"import sys; sys.modules.update(dict.fromkeys({names!r})); import mm_plugins"
    code = f"{blocked}; print([name for name in {names!r} if sys.modules[name]])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_command_line_loads_only_the_standard_library() -> None:
    assert (
        _loaded("import hf_plugins.cli as c; c.find_rooms()", ("torch", "numpy", "mmengine", "packaging"))
        == "[]"
    )
