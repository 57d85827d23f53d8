"""The console command ``mmhf``: lists the methods, checks the machine, and hands the rest to a method's own
command.

Only the standard library is imported here, so ``mmhf --help`` answers at once; a method is imported when it
is named.
"""

import argparse
import ast
import importlib
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("mm_plugins", "hf_plugins")
# Folders that serve several rooms and are no method themselves.
SHARED = frozenset({"compat", "rounds", "data_ops"})
# The leak scanner is asked for by what it does, not by the name of the paper's attack.
ALIASES = {"leak-scan": "embed-parrot"}
# Rooms that need more than their side's extra.
EXTRAS = {
    "tee-split": "hf,tee",
    "dp-fedavg": "hf,federated",
    "hpn": "hf,federated",
    "dpf-cm": "hf,data",
    "autodp": "hf,data",
}


class Room(NamedTuple):
    """One method of the suite, read from its folder without importing it."""

    name: str
    """As typed after ``mmhf``, for example ``dp-fedavg``."""
    module: str
    """As imported, for example ``hf_plugins.dp_fedavg``."""
    summary: str
    """First line of the package's docstring."""
    has_command: bool
    """Whether ``mmhf NAME`` works; a room without a command is used through its host's config."""


def find_rooms(root: Path | None = None) -> list[Room]:
    """All rooms below ``root`` (default: where this suite is installed), by package and name."""
    root = root or Path(__file__).resolve().parent.parent
    rooms = []
    for package in PACKAGES:
        for init in sorted((root / package).glob("*/__init__.py")):
            folder = init.parent
            if folder.name in SHARED:
                continue
            docstring = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
            rooms.append(
                Room(
                    name=folder.name.replace("_", "-"),
                    module=f"{package}.{folder.name}",
                    summary=docstring.splitlines()[0] if docstring else "",
                    has_command=(folder / "__main__.py").is_file(),
                )
            )
    return rooms


def _list_rooms(rooms: Sequence[Room]) -> int:
    width = max((len(room.name) for room in rooms), default=0)
    for room in rooms:
        how = f"mmhf {room.name}" if room.has_command else "through its host's config"
        sys.stdout.write(f"{room.name:<{width}}  {room.summary}  [{how}]\n")
    return 0


def _dispatch(method: str, arguments: Sequence[str], rooms: Sequence[Room]) -> int:
    name = ALIASES.get(method, method)
    room = next((room for room in rooms if room.name == name), None)
    if room is None:
        known = [room.name for room in rooms] + [*ALIASES, "list", "doctor", "demo"]
        near = get_close_matches(method, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        sys.stderr.write(f"mmhf: no method {method!r}.{hint} `mmhf list` shows all of them.\n")
        return 2
    if not room.has_command:
        sys.stderr.write(
            f"mmhf: {room.name} has no command of its own; it is used through a config of its host. "
            f"See {room.module.replace('.', '/')}/README.md.\n"
        )
        return 2
    try:
        command = importlib.import_module(f"{room.module}.__main__")
        return command.main(list(arguments))
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("hf_plugins", "mm_plugins"):
            raise
        extra = EXTRAS.get(room.name, "mm" if room.module.startswith("mm_") else "hf")
        sys.stderr.write(
            f"mmhf: {room.name} needs the package {error.name!r}, which is not installed. "
            f'Install the extra: pip install "mmhf-plugins[{extra}]"; `mmhf doctor` tells the rest.\n'
        )
        return 1
    except ImportError as error:
        # The room's own package has said what is missing and how to get it.
        sys.stderr.write(f"mmhf: {error}\n")
        return 1


def _parser(rooms: Sequence[Room]) -> argparse.ArgumentParser:
    methods = "\n".join(f"  {room.name:<14}{room.summary}" for room in rooms if room.has_command)
    parser = argparse.ArgumentParser(
        prog="mmhf",
        description="Published methods as plugins for OpenMMLab and Hugging Face.",
        epilog=f"methods (`mmhf METHOD --help` for each):\n{methods}\n\nall methods: `mmhf list`",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = "list: all methods; doctor: check this machine; demo: one detector teaches another"
    parser.add_argument("command", metavar="COMMAND", help=f"{commands}; or the name of a method")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what that command takes")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``mmhf``; returns the exit code (0 fine, 1 something is missing, 2 wrong use, 130
    interrupted).
    """
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        sys.stderr.write("\nmmhf: interrupted; nothing half-written is left.\n")
        return 130


def _run(argv: list[str]) -> int:
    rooms = find_rooms()
    parser = _parser(rooms)
    if not argv:
        parser.print_help()
        return 2
    if argv[0].startswith("-"):
        parser.parse_args(argv)
    command, arguments = argv[0], argv[1:]
    if command == "list":
        return _list_rooms(rooms)
    if command == "doctor":
        return importlib.import_module("hf_plugins.doctor").main(arguments)
    if command == "demo":
        return importlib.import_module("hf_plugins.demo").main(arguments)
    return _dispatch(command, arguments, rooms)
