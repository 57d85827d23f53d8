"""Users from files: IDX, LEAF, and files that are something else."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from hf_plugins.dp_fedavg import RunConfig
from hf_plugins.dp_fedavg.dataset import CHARACTERS, encode_characters, load_users, read_idx
from tests.hf_plugins.dp_fedavg.tiny import DATA
from tests.real_data import real_data


def run(**options: object) -> RunConfig:
    return RunConfig(**{"task": "images", "data": str(DATA), "output_dir": "x", "num_rounds": 1, **options})


@pytest.mark.real
def test_images_of_the_repository() -> None:
    users = load_users(run(num_clients=20, alpha=0.3, max_records=8))
    assert len(users) == 20
    assert users.train[0].shape == (200, 1, 28, 28)
    assert users.test[0].shape == (100, 1, 28, 28)
    assert users.num_classes == 10
    images, labels = users.records(3)
    assert images.shape == (8, 1, 28, 28)
    assert labels.dtype.is_floating_point is False
    # 0 and 255 with MNIST's mean 0.1307 and spread 0.3081.
    assert float(users.train[0].min()) == pytest.approx(-0.1307 / 0.3081, abs=1e-4)
    assert float(users.train[0].max()) == pytest.approx((1 - 0.1307) / 0.3081, abs=1e-4)
    owners = np.concatenate(users.owners)
    assert len(owners) == len(set(owners.tolist())), "no record has two owners"


@pytest.mark.real
def test_mnist_test_files_are_found() -> None:
    users = load_users(run(data=str(real_data("mnist")), num_clients=100, max_test_records=50))
    assert len(users.test[0]) == 50
    assert len(users.train[0]) == 60000


@pytest.mark.real
def test_speakers_are_users() -> None:
    folder = real_data("federated_shakespeare")
    users = load_users(run(task="characters", data=str(folder), model="gru", max_length=16))
    assert len(users) == 166
    x, y = users.records(0)
    assert x.shape == y.shape
    assert x.shape[1] == 16
    assert bool((x[:, 1:] == y[:, :-1]).all()), "targets are the inputs, one further"


def test_characters(tmp_path: Path) -> None:
    """21 characters and windows of 4 + 1: starts 0, 4, 8, 12, 16; the last window is for the test."""
    path = tmp_path / "speakers.json"
    text = "abcdefghijklmnopqrstu"
    path.write_text(json.dumps({"users": ["u", "v"], "user_data": {"u": [text], "v": ["short"]}}))
    users = load_users(run(task="characters", data=str(path), max_length=4))
    assert len(users) == 2
    x, y = users.records(0)
    assert x.tolist() == [encode_characters(text[i : i + 4]) for i in (0, 4, 8, 12)]
    assert y.tolist() == [encode_characters(text[i : i + 4]) for i in (1, 5, 9, 13)]
    assert users.test[0].tolist() == [encode_characters("qrst")]
    assert len(users.records(1)[0]) == 1, "one window is for training"
    assert encode_characters("\n \u00e9") == [0, 1, 1]
    assert users.num_classes == len(CHARACTERS) == 96


def test_idx_plain_and_packed(tmp_path: Path) -> None:
    content = b"\x00\x00\x08\x02" + struct.pack(">2I", 2, 3) + bytes(range(6))
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "a.gz").write_bytes(gzip.compress(content))
    for name in ("a", "a.gz"):
        assert read_idx(tmp_path / name).tolist() == [[0, 1, 2], [3, 4, 5]]
    (tmp_path / "b").write_bytes(b"PNG?")
    with pytest.raises(ValueError, match="is no IDX file of bytes"):
        read_idx(tmp_path / "b")


def test_absent_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="point data at the folder that does"):
        load_users(run(data=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="names a JSON file in LEAF"):
        load_users(run(task="characters", data=str(tmp_path / "no.json")))
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="needs the keys users and user_data"):
        load_users(run(task="characters", data=str(tmp_path)))
