"""Users of a recipe: whose records are whose, and the records that test the global model."""

import gzip
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_plugins.dp_fedavg.config import RunConfig
from hf_plugins.rounds import dirichlet_split


@dataclass(kw_only=True)
class Users:
    """Records of all users in shared tensors, and who owns which rows."""

    train: tuple[Tensor, ...]
    """Inputs and targets, a row for each record."""
    owners: Sequence[np.ndarray]
    """Rows of each user."""
    test: tuple[Tensor, ...]
    """Records that no user owns."""
    num_classes: int
    """Classes, or characters."""

    def records(self, client_id: int) -> tuple[Tensor, ...]:
        """One user's records; a copy, made when asked for."""
        rows = torch.from_numpy(np.ascontiguousarray(self.owners[client_id]))
        return tuple(tensor[rows] for tensor in self.train)

    def __len__(self) -> int:
        return len(self.owners)


def load_users(run: RunConfig) -> Users:
    """Users of a task of tensors (images or characters); text has `TextUsers` in ``peft.py``.

    Raises:
        FileNotFoundError: If the data is not there.
        ValueError: If the files are not what the task needs.
    """
    users = _images(run) if run.task == "images" else _characters(run)
    if run.max_records:
        users.owners = [rows[: run.max_records] for rows in users.owners]
    if run.max_test_records:
        users.test = tuple(tensor[: run.max_test_records] for tensor in users.test)
    return users


def read_idx(path: Path) -> np.ndarray:
    """Array of an IDX file (MNIST's format), gzip or plain.

    Raises:
        ValueError: If the file is not in that format.
    """
    content = read_bytes(path)
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is no IDX file of bytes; MNIST's own files are.")
    shape = struct.unpack(f">{content[3]}I", content[4 : 4 + 4 * content[3]])
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


def find_file(folder: Path, pattern: str) -> Path:
    """The first file of a folder whose name fits.

    Raises:
        FileNotFoundError: If none does.
    """
    found = sorted(folder.glob(pattern))
    if not found:
        raise FileNotFoundError(f"{folder} holds no {pattern}; point data at the folder that does.")
    return found[0]


def read_bytes(path: Path) -> bytes:
    """Content of a file, unpacked when its name ends in ``.gz``."""
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def _images(run: RunConfig) -> Users:
    folder = Path(run.data)
    train_x, train_y = (read_idx(find_file(folder, f"train*{kind}-idx*")) for kind in ("images", "labels"))
    # MNIST calls its test files t10k, subsets call theirs test.
    test_x, test_y = (read_idx(find_file(folder, f"t[e1]*{kind}-idx*")) for kind in ("images", "labels"))
    owners = dirichlet_split(train_y.tolist(), run.num_clients, alpha=run.alpha, seed=run.model_seed)
    # MNIST's usual mean and spread; public constants, no statistics of the users.
    tensors = [
        (torch.from_numpy(x.astype(np.float32))[:, None] / 255 - 0.1307) / 0.3081 for x in (train_x, test_x)
    ]
    return Users(
        train=(tensors[0], torch.from_numpy(train_y.astype(np.int64))),
        owners=owners,
        test=(tensors[1], torch.from_numpy(test_y.astype(np.int64))),
        num_classes=int(max(train_y.max(), test_y.max())) + 1,
    )


# Printable ASCII and the newline; a fixed, public vocabulary.
CHARACTERS = "\n" + "".join(chr(code) for code in range(32, 127))


def encode_characters(text: str) -> list[int]:
    """Index of each character; unknown ones count as spaces."""
    table = {character: index for index, character in enumerate(CHARACTERS)}
    return [table.get(character, table[" "]) for character in text]


def _characters(run: RunConfig) -> Users:
    path = Path(run.data)
    if path.is_dir():
        path = find_file(path, "*.json*")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; data names a JSON file in LEAF's layout (or its folder)."
        )
    content: dict[str, Any] = json.loads(read_bytes(path))
    if not {"users", "user_data"} <= set(content):
        raise ValueError(
            f"{path} needs the keys users and user_data (LEAF's layout); it has {sorted(content)}."
        )
    length = run.max_length
    train: list[list[int]] = []
    test: list[list[int]] = []
    owners = []
    for name in content["users"]:
        codes = encode_characters("\n".join(content["user_data"][name]))
        # A window holds the inputs and, one further, the targets; the last tenth is the test.
        windows = [codes[i : i + length + 1] for i in range(0, len(codes) - length, length)]
        cut = max(1, len(windows) - max(1, len(windows) // 10)) if len(windows) > 1 else len(windows)
        owners.append(np.arange(len(train), len(train) + cut))
        train += windows[:cut]
        test += windows[cut:]
    x, t = torch.tensor(train), torch.tensor(test)
    return Users(
        train=(x[:, :-1], x[:, 1:]), owners=owners, test=(t[:, :-1], t[:, 1:]), num_classes=len(CHARACTERS)
    )
