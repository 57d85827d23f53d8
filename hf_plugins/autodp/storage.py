"""What a search keeps on disk: shared cache of tables and evaluations, append-only journal, lock of a run."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, load_from_disk
from filelock import FileLock, Timeout

from hf_plugins.whole_files import write_json

logger = logging.getLogger(__name__)

META = "entry.json"


class Cache:
    """Tables and evaluations by content key. Several runs and users may share one folder.

    An entry is built under a lock of its own, written beside its place and renamed into it, so a killed
    process leaves no half entry; an entry whose files changed since is built again.

    Args:
        folder: Where entries lie.
        reuse: Off, nothing is looked up: what is built is used by its own strategy alone (for measuring).
    """

    def __init__(self, folder: Path, *, reuse: bool = True) -> None:
        self.folder = folder
        self.reuse = reuse
        self.hits = 0
        self.misses = 0
        (folder / "tables").mkdir(parents=True, exist_ok=True)
        (folder / "evaluations").mkdir(exist_ok=True)
        (folder / "locks").mkdir(exist_ok=True)

    def table(
        self, key: str, build: Callable[[], tuple[Dataset, dict[str, Any]]]
    ) -> tuple[Dataset, dict[str, Any]]:
        """The table of a key and what was noted with it, built if it is not there."""
        place = self.folder / "tables" / key
        with FileLock(self.folder / "locks" / f"{key}.lock"):
            if self.reuse and (found := self._load(place)) is not None:
                self.hits += 1
                return found
            self.misses += 1
            table, note = build()
            aside = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{key[:8]}-"))
            if len(table):
                table.save_to_disk(str(aside / "rows"))
            else:
                # `load_from_disk` cannot read a table without rows; its columns are enough.
                write_json(aside / "empty.json", table.features.to_dict())
            note = note | {"num_rows": len(table)}
            (aside / META).write_text(
                json.dumps({"note": note, "files": _sums(aside / "rows")}), encoding="utf-8"
            )
            if place.exists():
                shutil.rmtree(place)
            os.replace(aside, place)
        return _read(place), note

    def _load(self, place: Path) -> tuple[Dataset, dict[str, Any]] | None:
        if not place.is_dir():
            return None
        try:
            entry = json.loads((place / META).read_text(encoding="utf-8"))
            if entry["files"] == _sums(place / "rows"):
                return _read(place), entry["note"]
        except (OSError, ValueError, KeyError) as error:
            logger.info("cache entry %s: %s", place.name, error)
        logger.warning("cache entry %s is damaged and is built again", place.name)
        return None

    def table_path(self, key: str) -> Path:
        """Folder of a stored table, as `datasets.load_from_disk` takes it."""
        return self.folder / "tables" / key / "rows"

    def evaluation(self, key: str) -> dict[str, Any] | None:
        """A stored evaluation, or None; a damaged one counts as absent."""
        path = self.folder / "evaluations" / f"{key}.json"
        if not self.reuse or not path.is_file():
            return None
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            entry = {}
        if not isinstance(entry, dict) or entry.get("sum") != _sum(entry.get("value")):
            logger.warning("stored evaluation %s is damaged and is made again", key[:12])
            return None
        return entry["value"]

    def store_evaluation(self, key: str, value: dict[str, Any]) -> None:
        """Keep an evaluation."""
        write_json(self.folder / "evaluations" / f"{key}.json", {"value": value, "sum": _sum(value)})


def _read(place: Path) -> Dataset:
    if not (place / "empty.json").is_file():
        return load_from_disk(str(place / "rows"))
    features = Features.from_dict(json.loads((place / "empty.json").read_text(encoding="utf-8")))
    return Dataset.from_dict({name: [] for name in features}, features=features)


def _sum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sums(folder: Path) -> dict[str, str]:
    found = {}
    # Not the files that `Dataset.map` leaves beside them.
    for path in sorted(folder.glob("data-*.arrow")):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


class Journal:
    """Append-only JSON lines, each on disk before the run goes on; a line cut by a kill is left out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, entry: dict[str, Any]) -> None:
        """Write one line and wait until it is on disk."""
        cut = self.path.is_file() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if cut else "") + json.dumps(entry, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def entries(self, kind: str | None = None) -> list[dict[str, Any]]:
        """All whole lines, or those of one kind."""
        if not self.path.is_file():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and kind in (None, entry.get("kind")):
                found.append(entry)
        return found


@contextmanager
def only_search(folder: Path) -> Iterator[None]:
    """Hold a run's folder for this process.

    Raises:
        RuntimeError: If another process holds it. The lock goes with its process, also after a kill.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "run.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RuntimeError(
            f"another search is working in {folder}; wait for it, or give this one an --out of its own. "
            "Both may share one cache folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


def settle_run(folder: Path, settings: dict[str, Any]) -> bool:
    """Note what a run was started with, or compare with the note; True if this goes on with an earlier run.

    Raises:
        ValueError: If the folder holds a run with other settings or other data.
    """
    path = folder / "settings.json"
    if not path.is_file():
        write_json(path, settings)
        return False
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); move {folder} away to start anew.") from error
    changed = sorted(key for key in set(before) | set(settings) if before.get(key) != settings.get(key))
    if changed:
        raise ValueError(
            f"{folder} holds a search with other settings: {', '.join(changed)} differ. Give the old ones "
            "to go on with it, or another --out to start anew; the cache is used either way."
        )
    return True
