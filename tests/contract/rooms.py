"""Where the rooms are and what their files are, read from the source without importing it."""

import ast
import functools
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("mm_plugins", "hf_plugins")
# Folders that serve several rooms; the rules of imports, docstrings and errors hold for them, the doors do
# not.
SHARED = frozenset({"compat", "rounds", "data_ops"})
MM_ROLES = frozenset({"loss", "detector", "head", "segmentor", "upsample", "metric", "dataset", "hook"})
HF_ROLES = frozenset(
    {"callback", "trainer", "model", "peft", "strategy", "client", "server", "storage", "agent"}
)
# One closed list; each side uses most of its own half.
ROLES = {package: MM_ROLES | HF_ROLES for package in PACKAGES}
# Doors of every room that are neither core nor adapter.
DOORS = frozenset({"__init__", "__main__", "config"})
# A core may import one more library of its field, with the reason.
CORE_LIBRARIES: dict[str, dict[str, str]] = {
    "lau": {"triton": "CUDA kernels are written in it; imported only when that backend is asked for"},
    "tee_split": {
        "cryptography": "every primitive of the channel: nothing home-made below the frame layer",
        "dcap_qvl": "verifies Intel SGX and TDX quotes",
    },
}
# The one exception to "no room imports another room".
ROOM_IMPORTS = {"dpnas": {"dp"}}


class Room(NamedTuple):
    """One method's folder."""

    package: str
    name: str

    @property
    def folder(self) -> Path:
        return ROOT / self.package / self.name

    @property
    def tests(self) -> Path:
        return ROOT / "tests" / self.package / self.name

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.py"))

    def adapters(self) -> list[Path]:
        return [path for path in self.files() if path.stem in ROLES[self.package]]

    def cores(self) -> list[Path]:
        return [path for path in self.files() if path.stem not in ROLES[self.package] | DOORS]

    def __str__(self) -> str:
        return f"{self.package}/{self.name}"


def rooms() -> list[Room]:
    """Every method's folder, present and future: a package of either side that is not shared."""
    inits = [path for package in PACKAGES for path in sorted((ROOT / package).glob("*/__init__.py"))]
    return [Room(p.parent.parent.name, p.parent.name) for p in inits if p.parent.name not in SHARED]


def source_files() -> list[Path]:
    """Every Python file of the two packages."""
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def label(value: object) -> str:
    """A test id that names the room or the file."""
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else str(value)


@functools.cache
def tree(path: Path) -> ast.Module:
    """The parsed file; parsed once."""
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_modules(path: Path) -> set[str]:
    """Full dotted names of all modules a file imports, relative imports resolved, lazy imports included."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    names: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            )
            module = ".".join(part for part in (base, node.module or "") if part)
            names |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return names
