"""Files that are whole or not there: written beside their place and renamed into it."""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | Path, *, sync: bool = True, private: bool = False) -> Iterator[Path]:
    """A place to write to, which takes the place of ``path`` when the block ends.

    Readers see the old content or the new one, a power cut keeps one of both, several writers do not mix, and
    an error (a full disk) leaves the old content alone.

    Args:
        path: Where the file shall be; missing folders are made.
        sync: Wait until the content is on the disk; off, a power cut may cost it.
        private: Only its owner may read the file, from its first byte on.

    Yields:
        Where to write it; a name in the same folder that ends in ``.part``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        if private:
            part.touch(mode=0o600)
        yield part
        if sync:
            with part.open("rb") as file:
                os.fsync(file.fileno())
        part.replace(path)
    except RuntimeError as error:
        # torch.save on a full disk: its archive writer complains of positions, and hides the reason.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    finally:
        part.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes, *, private: bool = False) -> None:
    """Write a whole file by `replacing`."""
    with replacing(path, private=private) as part:
        part.write_bytes(content)


def write_text(path: str | Path, text: str, *, private: bool = False) -> None:
    """Write a whole UTF-8 file by `replacing`; a lone surrogate (of a file's name) becomes an escape."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"), private=private)


def write_json(path: str | Path, value: Any, *, private: bool = False) -> None:
    """Write a whole JSON file by `replacing`, indented, with a line end."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n", private=private)
