"""IDX and Parquet files become tensors; a cut or foreign file is named."""

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hf_plugins.dpnas.dataset import load_images


def write_idx(folder: Path, pixels: np.ndarray, labels: np.ndarray, ending: str = "") -> None:
    opener = gzip.open if ending else open
    with opener(folder / f"train-images-idx3-ubyte{ending}", "wb") as file:
        file.write(struct.pack(">IIII", 0x803, *pixels.shape) + pixels.tobytes())
    with opener(folder / f"train-labels-idx1-ubyte{ending}", "wb") as file:
        file.write(struct.pack(">II", 0x801, len(labels)) + labels.tobytes())


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_files(tmp_path: Path, ending: str) -> None:
    pixels = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    write_idx(tmp_path, pixels, np.array([7, 0, 2], dtype=np.uint8), ending)
    images, labels = load_images(tmp_path, "train")
    assert images.shape == (3, 1, 4, 4)
    assert images[2, 0, 3, 3].item() == pytest.approx(47 / 255)
    assert labels.tolist() == [7, 0, 2]


def test_parquet_is_normalised_as_in_the_release(tmp_path: Path) -> None:
    """A picture of one colour (255, 0, 51): channels (1 - .485) / .229, (0 - .456) / .224, (.2 - .406) /
    .225.
    """
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (255, 0, 51)).save(buffer, "PNG")
    table = pa.table({"img": [{"bytes": buffer.getvalue(), "path": None}], "label": [3]})
    pq.write_table(table, tmp_path / "test-1.parquet")
    images, labels = load_images(tmp_path, "test")
    expected = torch.tensor([0.515 / 0.229, -0.456 / 0.224, -0.206 / 0.225]).view(1, 3, 1, 1)
    torch.testing.assert_close(images, expected.expand(1, 3, 4, 4))
    assert labels.tolist() == [3]


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no images of split .*'train': looked for"):
        load_images(tmp_path, "train")
    write_idx(tmp_path, np.zeros((2, 4, 4), np.uint8), np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match="do not pair: .*2 images, 3 labels"):
        load_images(tmp_path, "train")
    images = tmp_path / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"is cut: its head says .*\(2, 4, 4\), it holds 31 bytes"):
        load_images(tmp_path, "train")
    images.write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="is no IDX file of .*3 axes: it starts with"):
        load_images(tmp_path, "train")
    pq.write_table(pa.table({"picture": [1]}), tmp_path / "unseen.parquet")
    with pytest.raises(ValueError, match=r"needs the columns image \(or img\) and label; it has .*'picture'"):
        load_images(tmp_path, "unseen")
