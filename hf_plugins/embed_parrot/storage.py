"""What a scan keeps on disk: hidden states exported from a model, and finished parts of a scan."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_plugins.whole_files import replacing, write_json

FORMAT = "embed_parrot.states.v1"


@dataclass(frozen=True, kw_only=True)
class ExportedStates:
    """Hidden states of a model that is not at hand, with what an attacker would know of it."""

    codebook: Tensor
    """Input embeddings (vocabulary, width)."""
    head: Tensor | None
    """Output head (vocabulary, width), if it differs from the input embeddings."""
    ids: list[Tensor]
    """Tokens of each text."""
    states: dict[int, list[Tensor]]
    """States of each text, by layer."""


def export_states(
    path: str | Path,
    *,
    codebook: Tensor,
    ids: Sequence[Tensor],
    states: dict[int, Sequence[Tensor]],
    head: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write states so that they can be scanned elsewhere, by a machine that never sees the model.

    Args:
        path: A ``.safetensors`` file.
        codebook: Input embeddings (vocabulary, width).
        ids: Tokens of each text, unpadded.
        states: For each layer the states of each text (positions, width).
        head: Output head, if there is one of its own.
        dtype: Of the states on disk.

    Returns:
        The path.

    Raises:
        ValueError: If states and tokens do not fit.
    """
    lengths = [len(row) for row in ids]
    for layer, rows in states.items():
        if [len(row) for row in rows] != lengths:
            raise ValueError(
                f"layer {layer}: the states do not match the tokens, text by text; export them unpadded."
            )
    tensors = {
        "codebook": codebook.float().contiguous(),
        "ids": torch.cat(list(ids)),
        "lengths": torch.tensor(lengths),
    }
    if head is not None:
        tensors["head"] = head.float().contiguous()
    for layer, rows in states.items():
        tensors[f"layer.{layer}"] = torch.cat(list(rows)).to(dtype).contiguous()
    with replacing(path) as part:
        save_file(tensors, part, metadata={"format": FORMAT})
    return Path(path)


def load_states(path: str | Path) -> ExportedStates:
    """Read what `export_states` wrote.

    Raises:
        ValueError: If it is another kind of file, or its parts do not fit.
    """
    try:
        opened = safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is cut off or no safetensors file ({error}). Export it again.") from error
    with opened as file:
        names = set(file.keys())
        layers = sorted(int(name[6:]) for name in names if name.startswith("layer."))
        if not {"codebook", "ids", "lengths"} <= names or not layers:
            raise ValueError(
                f"{path} holds {', '.join(sorted(names)[:6])}; exported states need codebook, ids, lengths "
                "and layer.0 ... (write them with export_states or `mmhf leak-scan export`)."
            )
        lengths = file.get_tensor("lengths").tolist()
        ids = file.get_tensor("ids")
        if sum(lengths) != len(ids):
            raise ValueError(f"{path}: lengths add up to {sum(lengths)}, but there are {len(ids)} tokens.")
        states = {layer: list(file.get_tensor(f"layer.{layer}").float().split(lengths)) for layer in layers}
        return ExportedStates(
            codebook=file.get_tensor("codebook").float(),
            head=file.get_tensor("head").float() if "head" in names else None,
            ids=list(ids.split(lengths)),
            states=states,
        )


def fingerprint(value: Any) -> str:
    """Short hash of plain JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


class PartStore:
    """Finished parts of a scan, one small JSON file each, so that an interrupted scan goes on.

    Args:
        folder: Where they lie.
        identity: What the scan is made of (options, data, model); parts of another scan are refused.

    Raises:
        ValueError: If the folder belongs to another scan.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        note = self.folder / "scan.json"
        mine = fingerprint(identity)
        if note.is_file():
            theirs = json.loads(note.read_text(encoding="utf-8"))
            if theirs["fingerprint"] != mine:
                changed = [key for key in identity if theirs["identity"].get(key) != identity[key]]
                where = ", ".join(changed) or "its form"
                raise ValueError(
                    f"{self.folder} holds parts of another scan (differs in {where}); remove the folder or "
                    "give another one."
                )
        else:
            write_json(note, {"fingerprint": mine, "identity": identity})

    def _path(self, key: str) -> Path:
        return self.folder / f"{fingerprint(key)}.json"

    def get(self, key: str) -> Any | None:
        """The part of that name, or None if it is not finished."""
        path = self._path(key)
        return json.loads(path.read_text(encoding="utf-8"))["value"] if path.is_file() else None

    def put(self, key: str, value: Any) -> None:
        """Keep a finished part."""
        write_json(self._path(key), {"key": key, "value": value})
