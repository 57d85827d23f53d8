"""Code blocks of the documents, as a reader would copy them."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from tools.make_docs import documents

ROOT = Path(__file__).resolve().parents[2]
SHELL = ("bash", "sh", "console")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.S | re.M)


class Block(NamedTuple):
    """One fenced block."""

    document: str
    """Path below the repository's root."""
    line: int
    """Line of its first line, from 1."""
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    """Every fenced block of the documents in one of these languages."""
    paths = [*documents(ROOT), ROOT / "CONTRIBUTING.md"]
    found = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            if match.group(1) in languages:
                line = text.count("\n", 0, match.start(2)) + 1
                found.append(Block(str(path.relative_to(ROOT)), line, match.group(1), match.group(2)))
    return found


class Command(NamedTuple):
    """One command line of a shell block, continuation lines joined, comment and redirection taken off."""

    document: str
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.document}:{self.line}:{' '.join(self.words)[:60]}"


def commands() -> list[Command]:
    """Every command line of the documents."""
    found = []
    for block in blocks(*SHELL):
        joined = block.text.replace("\\\n", " ").splitlines()
        for number, text in enumerate(joined):
            words = shlex.split(text.removeprefix("$ "), comments=True)
            redirections = [i for i, word in enumerate(words) if word in (">", "2>", "&", "|")]
            words = words[: redirections[0]] if redirections else words
            if words:
                found.append(Command(block.document, block.line + number, tuple(words)))
    return found
