"""Read labelled images from files into tensors: the IDX files of MNIST, or Parquet with PNG or JPEG bytes."""

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_IDX_IMAGES, _IDX_LABELS = 0x803, 0x801
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _read_idx(path: Path, magic: int) -> np.ndarray:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        data = file.read()
    found = struct.unpack(">I", data[:4])[0] if len(data) >= 4 else None
    rank = magic & 0xFF
    if found != magic or len(data) < 4 + 4 * rank:
        raise ValueError(f"{path} is no IDX file of {rank} axes: it starts with {data[:4]!r}.")
    shape = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
    body = np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * rank)
    if body.size != int(np.prod(shape)):
        raise ValueError(f"{path} is cut: its head says {shape}, it holds {body.size} bytes.")
    return body.reshape(shape)


def load_images(folder: str | Path, split: str) -> tuple[Tensor, Tensor]:
    """Images and labels of one split.

    Args:
        folder: Holds ``SPLIT*images*idx3*`` and ``SPLIT*labels*idx1*`` (MNIST form, plain or ``.gz``), or
            ``SPLIT*.parquet`` with columns ``image`` or ``img`` (encoded bytes) and ``label``.
        split: First letters of the file names, for example ``train``, ``t10k`` or ``test``.

    Returns:
        Images (N, C, H, W) fp32 and labels (N,) int64. Grey images lie in [0, 1]; colour images are
        normalised by ImageNet's mean and standard deviation, as in the release.

    Raises:
        FileNotFoundError: If the folder holds neither form.
        ValueError: If a file is cut or of another kind, or images and labels do not pair.
    """
    folder = Path(folder)
    images, labels = (
        sorted(folder.glob(f"{split}*images*idx3*")),
        sorted(folder.glob(f"{split}*labels*idx1*")),
    )
    tables = sorted(folder.glob(f"{split}*.parquet"))
    if images and labels:
        grey, target = _read_idx(images[0], _IDX_IMAGES), _read_idx(labels[0], _IDX_LABELS)
        if len(grey) != len(target):
            raise ValueError(
                f"{images[0]} and {labels[0]} do not pair: {len(grey)} images, {len(target)} labels."
            )
        return torch.from_numpy(grey.copy()).float().div(255).unsqueeze(1), torch.from_numpy(
            target.copy()
        ).long()
    if tables:
        return _load_parquet(tables[0])
    raise FileNotFoundError(
        f"{folder} holds no images of split {split!r}: looked for {split}*images*idx3*, "
        f"{split}*labels*idx1* and {split}*.parquet."
    )


def _load_parquet(path: Path) -> tuple[Tensor, Tensor]:
    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.read_table(path)
    column = next((name for name in ("image", "img") if name in table.column_names), None)
    if column is None or "label" not in table.column_names:
        raise ValueError(f"{path} needs the columns image (or img) and label; it has {table.column_names}.")
    encoded = [row["bytes"] if isinstance(row, dict) else row for row in table[column].to_pylist()]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in encoded])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _STD))
    return (images - mean) / std, torch.tensor(table["label"].to_pylist(), dtype=torch.int64)
