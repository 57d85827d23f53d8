"""Take a command line as far as its own parser: what the reader typed is understood, nothing is run."""

import argparse
import importlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from hf_plugins.cli import find_rooms
from tests.docs.blocks import ROOT

ROOM_ALIASES = {"leak-scan": "embed-parrot"}
# Programs of others, of which only the presence of what they are pointed at is looked at.
FOREIGN = ("pip", "source", "pre-commit", "git", "cd")


class Parsed(Exception):
    """Raised in place of the work, once the whole command line has been understood."""


def stop_after_parsing(monkeypatch: "pytest.MonkeyPatch", words: Sequence[str]) -> None:  # noqa: F821
    """Let the parser that consumes the last word of ``words`` raise `Parsed` when it is content."""
    original, depth = argparse.ArgumentParser.parse_known_args, [0]

    def parse(self: argparse.ArgumentParser, args: Sequence[str] | None = None, namespace: object = None):  # noqa: ANN202
        depth[0] += 1
        try:
            result = original(self, args, namespace)
        finally:
            depth[0] -= 1
        given = list(args or ())
        # A command may look at its first word alone, add a sub-command, or take ``--config FILE`` out.
        last = bool(given) and given[-1] == words[-1] and len(given) >= len(words) - 1
        from_recipe = hasattr(self, "parse_args_into_dataclasses")
        # Words left over are for a second parser, or `parse_args` refuses them.
        if depth[0] == 0 and (last or from_recipe) and not result[1]:
            raise Parsed
        return result

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)


def entry_point(words: Sequence[str]) -> tuple[Callable[[list[str]], int], list[str]]:
    """The function behind a command of ours and the words it receives."""
    if words[0] == "mmhf":
        method = ROOM_ALIASES.get(words[1], words[1])
        room = next((room for room in find_rooms(ROOT) if room.name == method), None)
        if room is None:
            return importlib.import_module("hf_plugins.cli").main, list(words[1:])
        return importlib.import_module(f"{room.module}.__main__").main, list(words[2:])
    if words[0] == "accelerate":
        place = words.index("-m")
        launcher = importlib.import_module("accelerate.commands.launch").launch_command_parser()
        launcher.parse_args([*words[2:place], "-m", words[place + 1]])
        return entry_point(["python", *words[place:]])
    assert words[0] == "python", f"no test knows the program {words[0]!r}"
    if words[1] == "-m":
        module = words[2] if words[2].startswith("benchmarks") else f"{words[2]}.__main__"
        return importlib.import_module(module).main, list(words[3:])
    return importlib.import_module(words[1].removesuffix(".py").replace("/", ".")).main, list(words[2:])


def missing_paths(words: Sequence[str], places: Sequence[Path]) -> list[str]:
    """Files of this repository that a command names and that are in none of ``places``."""
    named = [word.split("=")[-1] for word in words]
    ours = [name for name in named if re.match(r"(configs|tests|tools|docs|benchmarks|requirements)/", name)]
    return [name for name in ours if not any((place / name).exists() for place in places)]
