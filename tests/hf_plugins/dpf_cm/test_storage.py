import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_plugins.dpf_cm.storage import (
    LanceStore,
    NumpyStore,
    QdrantStore,
    Rows,
    Sealed,
    StoreBusy,
    VectorStore,
    exact_hits,
    locked,
    open_store,
)

KEY = b"0123456789abcdef0123456789abcdef"
has_qdrant = importlib.util.find_spec("qdrant_client") is not None
KINDS = ["numpy", "lancedb", "sealed numpy", "sealed lancedb", *(["qdrant"] if has_qdrant else [])]


def make(kind: str, folder: Path) -> VectorStore:
    name = kind.split()[-1]
    place = ":memory:" if name == "qdrant" else str(folder / name)
    return open_store(name, place, key=KEY if kind.startswith("sealed") else None)


def rows(vectors: np.ndarray, prefix: str = "s", blob: bytes = b"") -> Rows:
    n = len(vectors)
    unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return Rows(
        [f"{prefix}{i}" for i in range(n)], np.zeros(n, np.int32), unit, [blob + b"#%d" % i for i in range(n)]
    )


def around(query: np.ndarray, cosines: list[float], seed: int = 0) -> np.ndarray:
    """Unit vectors at given cosines to a query, exact to float64."""
    rng = np.random.default_rng(seed)
    q = query / np.linalg.norm(query)
    found = []
    for cosine in cosines:
        side = rng.normal(size=len(q))
        side -= (side @ q) * q
        found.append(cosine * q + np.sqrt(1 - cosine**2) * side / np.linalg.norm(side))
    return np.array(found)


@pytest.mark.parametrize("kind", KINDS)
def test_every_store_gives_the_same_ids_at_the_threshold(kind: str, tmp_path: Path) -> None:
    """10,000 random vectors and twenty at tau +- 1e-6: decided in float64, by every store alike."""
    if kind == "qdrant":
        pytest.skip("10,000 points are slow inside the client; the small test covers it")
    rng = np.random.default_rng(1)
    query = rng.normal(size=16)
    tau = 0.8
    edge = around(query, [tau + 1e-6, tau - 1e-6] * 10)
    data = rows(np.concatenate([rng.normal(size=(10_000, 16)), edge]))
    cosines = data.vectors.astype(np.float64) @ (query / np.linalg.norm(query))
    cosines /= np.linalg.norm(data.vectors.astype(np.float64), axis=1)
    expected = sorted((data.ids[i], 0) for i in np.nonzero(cosines >= tau)[0])
    assert {f"s{i}" for i in range(10_000, 10_020, 2)} <= {name for name, _ in expected}
    assert not {f"s{i}" for i in range(10_001, 10_020, 2)} & {name for name, _ in expected}
    store = make(kind, tmp_path)
    store.add(data)
    assert store.search(query, tau) == expected
    assert len(store) == 10_020


@pytest.mark.parametrize("kind", KINDS)
def test_add_load_delete(kind: str, tmp_path: Path) -> None:
    store = make(kind, tmp_path)
    assert len(store) == 0
    assert store.search(np.ones(4), 0.5) == []
    assert len(store.load()) == 0
    data = rows(np.eye(4), blob=b"payload")
    store.add(data)
    store.add(rows(-np.eye(4), prefix="t"))
    found = store.load()
    order = {name: i for i, name in enumerate(found.ids)}
    for i, name in enumerate(data.ids):
        np.testing.assert_array_equal(found.vectors[order[name]], data.vectors[i])
        assert found.blobs[order[name]] == data.blobs[i]
    assert store.search(np.eye(4)[1], 0.9) == [("s1", 0)]
    assert store.delete(["s1", "t0", "unknown"]) == 2
    assert store.search(np.eye(4)[1], 0.9) == []
    assert len(store) == 6
    if kind != "qdrant":
        assert sorted(make(kind, tmp_path).load().ids) == sorted(
            set(data.ids + ["t0", "t1", "t2", "t3"]) - {"s1", "t0"}
        )
    assert store.delete([f"{p}{i}" for p in "st" for i in range(4)]) == 6
    assert len(store) == 0
    store.add(data)
    assert len(store) == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda v: v * np.nan, "must be finite; got NaN or infinity. Run the model in fp32"),
        (lambda v: v * 0, "4.* vectors are zero"),
        (lambda v: v[:, :3], "must have 4 dimensions each, as those in the store"),
    ],
)
def test_bad_vectors(
    kind: str, spoil: Callable[[np.ndarray], np.ndarray], match: str, tmp_path: Path
) -> None:
    store = make(kind, tmp_path)
    data = rows(np.eye(4))
    store.add(data)
    wrong = Rows([f"x{i}" for i in range(4)], data.slots, spoil(data.vectors).astype(np.float32), data.blobs)
    if kind.startswith("sealed") and "dimensions" in match:
        pytest.skip("a sealed store does not know the width of what it holds")
    with pytest.raises(ValueError, match=match):
        store.add(wrong)
    assert len(store) == 4


def test_bad_queries_and_ids(tmp_path: Path) -> None:
    for kind in ("numpy", "lancedb"):
        store = make(kind, tmp_path)
        store.add(rows(np.eye(4)))
        with pytest.raises(ValueError, match=r"a query must be one vector of .*4 entries; got shape \(3,\)"):
            store.search(np.ones(3), 0.5)
        with pytest.raises(
            ValueError, match="must be finite and not zero; pool over at least one content token"
        ):
            store.search(np.zeros(4), 0.5)
        with pytest.raises(ValueError, match="every row needs an id"):
            store.add(Rows([""], np.zeros(1, np.int32), np.eye(4, dtype=np.float32)[:1], [b""]))
    assert exact_hits(np.zeros((0, 4)), np.ones(4), 0.5).tolist() == []


def test_a_cosine_at_the_threshold_is_a_hit() -> None:
    """(3, 4) has norm 5, so its cosine with the first axis is 3/5, in floating point too."""
    vectors = np.array([[3.0, 4.0], [4.0, 3.0], [2.0, 4.0]])
    assert exact_hits(vectors, np.array([1.0, 0.0]), 0.6).tolist() == [0, 1]


def _bytes_on_disk(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


@pytest.mark.parametrize("kind", ["numpy", "lancedb"])
def test_deleted_rows_are_gone_from_the_disk(kind: str, tmp_path: Path) -> None:
    """No version and no file holds the payload or the vector any more."""
    store = make(kind, tmp_path)
    data = rows(np.random.default_rng(0).normal(size=(50, 8)), blob=b"PRIVATE")
    store.add(data)
    assert b"PRIVATE#7" in _bytes_on_disk(tmp_path)
    vector = data.vectors[7].tobytes()
    store.delete(["s7"])
    left = _bytes_on_disk(tmp_path)
    assert b"PRIVATE#7" not in left
    assert vector not in left
    assert b"PRIVATE#8" in left
    if isinstance(store, LanceStore):
        table = store._db.open_table("keys")
        for version in table.list_versions():
            table.checkout(version["version"])
            assert table.count_rows("id = 's7'") == 0
        assert len(table.list_versions()) == 1


def test_lance_follows_links_as_the_system_does(tmp_path: Path) -> None:
    """``link/../keys`` lies beside the link's target; Lance alone would look beside the link."""
    (tmp_path / "real" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "inner")
    LanceStore(tmp_path / "link" / ".." / "keys").add(rows(np.eye(4), blob=b"x"))
    assert (tmp_path / "real" / "keys").is_dir()
    assert len(LanceStore(tmp_path / "real" / "keys")) == 4


@pytest.mark.parametrize("kind", ["sealed numpy", "sealed lancedb"])
def test_sealed_files_say_nothing(kind: str, tmp_path: Path) -> None:
    store = make(kind, tmp_path)
    data = rows(np.random.default_rng(0).normal(size=(20, 8)), prefix="patient-", blob=b"PRIVATE")
    store.add(data)
    left = _bytes_on_disk(tmp_path)
    for secret in (b"PRIVATE", b"patient-", data.vectors[3].tobytes(), KEY):
        assert secret not in left
    wrong = open_store(kind.split()[1], str(tmp_path / kind.split()[1]), key=b"f" * 32)
    with pytest.raises(ValueError, match="does not open with this key, or its data were changed"):
        wrong.load()
    with pytest.raises(
        ValueError, match=r"the key must be 32 bytes; got 3.*. Make one with secrets.token_bytes\(32\)"
    ):
        Sealed(NumpyStore(), b"abc")


@pytest.mark.host
@pytest.mark.parametrize("kind", ["numpy", "lancedb"])
def test_second_process_reads_and_writes(kind: str, tmp_path: Path) -> None:
    make(kind, tmp_path).add(rows(np.eye(4)))
    code = (
        "import sys, numpy as np\n"
        "from hf_plugins.dpf_cm.storage import Rows, open_store\n"
        "s = open_store(sys.argv[1], sys.argv[2])\n"
        "print(len(s), s.search(np.eye(4)[2], 0.9))\n"
        "s.add(Rows(['n' + sys.argv[3]], np.zeros(1, np.int32), -np.eye(4, dtype=np.float32)[:1], [b'']))\n"
    )
    first = make(kind, tmp_path)
    assert len(first) == 4
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", code, kind, str(tmp_path / kind), str(i)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    outs = [job.communicate(timeout=100)[0] for job in jobs]
    assert all("[('s2', 0)]" in out for out in outs)
    # The store that was open all along sees what the others wrote.
    assert sorted(first.load().ids) == ["n0", "n1", "s0", "s1", "s2", "s3"]


def test_lock_is_held_and_freed(tmp_path: Path) -> None:
    with locked(tmp_path / "l"):
        with pytest.raises(StoreBusy, match="another process writes to"):
            with locked(tmp_path / "l", wait=0.1):
                pass
    with locked(tmp_path / "l", wait=0.1):
        pass


def test_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = NumpyStore(tmp_path)
    store.add(rows(np.eye(4)))

    def full(*args: Any, **kwargs: Any) -> None:
        args[0].write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        store.add(rows(-np.eye(4), prefix="t"))
    monkeypatch.undo()
    assert len(NumpyStore(tmp_path).load()) == 4
    assert sorted(os.listdir(tmp_path)) == ["keys.lock", "keys.npz"]


def test_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="store must be one of .*numpy, lancedb, qdrant; got 'redis'"):
        open_store("redis", None)
    with pytest.raises(ValueError, match="the lancedb.* store needs a place: a folder or URL"):
        open_store("lancedb", None)
    memory = open_store("numpy", None)
    memory.add(rows(np.eye(4)))
    assert len(memory) == 4
    for package, make_one, match in (
        ("lancedb", lambda: LanceStore(tmp_path), "the lancedb store needs the extra"),
        (
            "qdrant_client",
            lambda: QdrantStore(":memory:"),
            "the qdrant store needs its client: pip install qdrant-client",
        ),
        (
            "cryptography.hazmat.primitives.ciphers.aead",
            lambda: Sealed(NumpyStore(), KEY),
            'protect="encrypt" needs the extra',
        ),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=match):
            make_one()
