"""What a user hands to a command line, read with errors that say what is wrong where: recipes, weights."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml


def read_recipe(path: str | Path) -> dict[str, Any]:
    """A recipe's options; plain values only, no Python objects.

    Args:
        path: YAML file that holds one mapping (``option: value`` lines).

    Returns:
        The mapping.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no file, no UTF-8, no YAML, or no mapping; the message says where.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a recipe is one YAML file in it.")
    if not path.is_file():
        raise FileNotFoundError(f"the recipe {path} does not exist; configs/ holds some to start from.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not readable"
        raise ValueError(f"{path}{where}: {problem}. A recipe has plain `option: value` lines.") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} must hold `option: value` lines; it holds {type(content).__name__}. "
            "The folder configs/ has examples."
        )
    return content


def check_weights(folder: str | Path) -> None:
    """Refuse a model folder whose weights are a pickle or cut off, before a host stumbles over them.

    Args:
        folder: ``save_pretrained`` folder, of a model or of an adapter. A folder without weights of either
            kind is left to the host, which says what it expects.

    Raises:
        ValueError: If a safetensors file cannot be opened, or only a pickle is there, which could run code.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(Path(folder).glob("*.safetensors"))
    for file in files:
        try:
            with safe_open(str(file), framework="numpy"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} is cut off or no safetensors file ({error}). Copy it again.") from error
    pickles = [path.name for path in sorted(Path(folder).glob("*.bin")) if path.name != "training_args.bin"]
    if pickles and not files:
        raise ValueError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when it is read. "
            "Load the model where you trust it and save it again: save_pretrained writes safetensors."
        )


def check_shard_names(folder: str | Path, names: Iterable[str]) -> None:
    """Refuse an index of shards that names a file outside of its folder.

    Args:
        folder: Folder of the checkpoint, for the message.
        names: File names of the index's ``weight_map``.

    Raises:
        ValueError: If one is more than a file name.
    """
    outside = sorted(name for name in set(names) if Path(name).name != name)
    if outside:
        raise ValueError(
            f"the index of {folder} names {outside[0]!r}, which is not a file of that folder. Do not "
            "trust this checkpoint; if you moved its shards yourself, put them beside the index."
        )
