"""Encoding of data sets, and the tasks of the command line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from hf_plugins.hpn import encode_client
from hf_plugins.hpn.config import HPNConfig
from hf_plugins.hpn.dataset import make_encoder, make_federation, read_idx
from hf_plugins.hpn.embedding import Encoder
from hf_plugins.rounds import Job, TrainableVector

TINY = Path(__file__).parents[2] / "data" / "fashion_mnist_tiny"


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_all_forms_of_a_data_set_give_one_encoding() -> None:
    x, y = torch.randn(9, 2, 3, generator=_generator()), torch.randint(4, (9,), generator=_generator())
    encoder = Encoder(kind="rff", num_labels=4, dim=6)
    rows = [{"pixel_values": a, "labels": int(b)} for a, b in zip(x, y, strict=True)]
    found = [
        encode_client(data, encoder, noise_multiplier=1.39, generator=_generator()).vector
        for data in ((x, y), TensorDataset(x, y), rows)
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert encode_client((x, y), encoder, noise_multiplier=1.3906, generator=_generator()).epsilon(
        1e-5
    ) == pytest.approx(3.0, abs=1e-3)


def test_datasets_of_hugging_face() -> None:
    datasets = pytest.importorskip("datasets")
    x, y = torch.randn(5, 3, generator=_generator()), torch.tensor([0, 1, 1, 0, 1])
    table = datasets.Dataset.from_dict({"x": x.tolist(), "y": y.tolist()})
    encoder = Encoder(kind="rff", num_labels=2, dim=3)
    found = encode_client(
        table, encoder, noise_multiplier=0.0, generator=_generator(), input_column="x", label_column="y"
    )
    torch.testing.assert_close(found.vector, encoder.mean(x, y), atol=1e-6, rtol=0)
    with pytest.raises(
        ValueError,
        match="the data set has no column .*'pixel_values'; it has x, y.* Name them with input_column",
    ):
        encode_client(table, encoder, noise_multiplier=0.0, generator=_generator())


def test_an_empty_client_is_refused() -> None:
    with pytest.raises(ValueError, match="no example to encode; give it data"):
        encode_client([], Encoder(kind="histogram", num_labels=2), noise_multiplier=0, generator=_generator())


def test_encoders_of_the_options() -> None:
    public = 2 * torch.randn(100, 3, 2, generator=_generator())
    assert make_encoder(HPNConfig(), num_labels=3, public=public).bandwidth == 127.0
    median = make_encoder(HPNConfig(encoder="rff-median"), num_labels=3, public=public)
    # Squared distances of N(0, 4) in 6 dimensions: 8 times chi-square, median 8 * 5.35, half of it 21.4.
    assert median.bandwidth == pytest.approx(21.4, rel=0.15)
    assert make_encoder(HPNConfig(encoder="histogram"), num_labels=3, public=public).size == 3


def test_synthetic_optimum_is_where_it_is_said_to_be() -> None:
    """One step at the known best rate lands on the client's optimum: accuracy 1 from any start."""
    config = HPNConfig(encoding_epsilon=None)
    federation = make_federation("synthetic", {"num_clients": 5}, config)
    clients = federation.transport.clients
    assert [federation.known_best[k]["learning_rate"] for k in range(5)] == [4.0, 2.0, 1.0, 0.5, 0.25]
    weights = federation.transport.weights
    assert isinstance(weights, TrainableVector)
    for client in range(5):
        values = {}
        for rate in (0.25, 0.5, 1.0, 2.0, 4.0):
            weights.write_(torch.randn(len(weights), generator=_generator()))
            job = Job(client_id=client, round_index=0, seed=0, config={"learning_rate": rate})
            values[rate] = clients[client].train(weights, job).metrics["hpn.value"]
        best = federation.known_best[client]["learning_rate"]
        assert values[best] == pytest.approx(1.0, abs=1e-5)
        assert all(value < 1 - 1e-3 for rate, value in values.items() if rate != best)


def test_images_are_split_and_sensors_differ() -> None:
    args = {"folder": str(TINY), "num_clients": 4, "contrast": [1.0, 3.0], "limit": 120}
    federation = make_federation("images", args, HPNConfig())
    sizes = [[len(c.inner.records[0]), len(c.inner.validation[0])] for c in federation.transport.clients]
    assert sizes == [[18, 6]] * 4
    largest = [float(c.inner.records[0].max()) for c in federation.transport.clients]
    assert largest == pytest.approx([1.0, 3.0, 1.0, 3.0])
    tests = [c.inner.validation[0] for c in federation.test.clients]
    assert not torch.equal(tests[0], federation.transport.clients[0].inner.validation[0])
    assert len(tests[0]) == 6


def test_wrong_labels_are_in_training_records_only() -> None:
    args = {"folder": str(TINY), "num_clients": 4, "label_noise": 1.0, "noisy_share": 0.5}
    clean = make_federation("images", {**args, "noisy_share": 0.0}, HPNConfig()).transport.clients
    noisy = make_federation("images", args, HPNConfig()).transport.clients
    changed = [
        not torch.equal(a.inner.records[1], b.inner.records[1]) for a, b in zip(clean, noisy, strict=True)
    ]
    assert sum(changed) == 2
    for a, b in zip(clean, noisy, strict=True):
        assert torch.equal(a.inner.validation[1], b.inner.validation[1])


def test_vectors_of_an_npz(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "x.npz"
    np.savez(path, x=rng.normal(size=(60, 5)), labels=np.arange(60) % 3)
    federation = make_federation("npz", {"file": str(path), "num_clients": 3, "scale": [1, 2]}, HPNConfig())
    assert len(federation.transport.clients) == 3
    assert federation.transport.clients[0].encoder.num_labels == 3
    np.savez(path, x=rng.normal(size=(60, 5)))
    with pytest.raises(ValueError, match=r" lacks the arrays .*labels; it has \['x'\]"):
        make_federation("npz", {"file": str(path)}, HPNConfig())
    with pytest.raises(FileNotFoundError, match="does not exist; write arrays x and labels with numpy.savez"):
        make_federation("npz", {"file": str(tmp_path / "none.npz")}, HPNConfig())


def test_own_tasks_by_import_path() -> None:
    federation = make_federation("tests.hf_plugins.hpn.tiny:federation", {"num_clients": 2}, HPNConfig())
    assert len(federation.transport.clients) == 2


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="task must be one of .*synthetic, images, npz.* or module:function; got .*cifar"
    ):
        make_federation("cifar", {}, HPNConfig())
    with pytest.raises(ValueError, match="task='nowhere:f' cannot be imported .*on PYTHONPATH"):
        make_federation("nowhere:f", {}, HPNConfig())
    with pytest.raises(ValueError, match="task_args of .*'synthetic': .*colour"):
        make_federation("synthetic", {"colour": 1}, HPNConfig())
    with pytest.raises(
        FileNotFoundError, match=r"holds no train\*images\*idx\* file .*check folder and split"
    ):
        read_idx(tmp_path, "train")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"hello")
    with pytest.raises(ValueError, match=" is no IDX file of .*images: it starts with .*b'hell'"):
        read_idx(tmp_path, "train")
