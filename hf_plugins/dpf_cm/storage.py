"""Where the keys lie: stores with exact search and true erasure, sealed or sketched if asked."""

import contextlib
import json
import secrets
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hf_plugins.whole_files import replacing

STORES = ("numpy", "lancedb", "qdrant")


class StoreBusy(RuntimeError):
    """Another process is writing to the store."""


@dataclass
class Rows:
    """Keys with what belongs to them; row i of each field is one key."""

    ids: list[str]
    """Sample of a key; a sample has several."""
    slots: np.ndarray
    """Place of a key among its sample's (int32)."""
    vectors: np.ndarray
    """Unit vectors (N, H) float32."""
    blobs: list[bytes]
    """What a match returns: JSON of the sample at slot 0, empty elsewhere."""

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, keep: Sequence[int]) -> "Rows":
        """Some of the rows."""
        index = np.asarray(keep, dtype=np.int64)
        return Rows(
            [self.ids[i] for i in keep], self.slots[index], self.vectors[index], [self.blobs[i] for i in keep]
        )


def check_rows(rows: Rows, width: int | None) -> None:
    """Refuse what no search could find again.

    Raises:
        ValueError: If a vector is NaN, zero or of another width, or an id is empty.
    """
    vectors = rows.vectors
    if vectors.ndim != 2 or (width is not None and vectors.shape[1] != width):
        raise ValueError(
            f"vectors must have {width or 'one'} dimensions each, as those in the store; got shape "
            f"{vectors.shape}. A store holds states of one layer of one model: start a new one for another."
        )
    if not np.isfinite(vectors).all():
        raise ValueError(
            "vectors must be finite; got NaN or infinity. Run the model in fp32 or bf16 instead of fp16."
        )
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
    if len(norms) and norms.min() < 1e-6:
        raise ValueError(
            f"{int((norms < 1e-6).sum())} vectors are zero and have no direction to compare; a "
            "sample without content tokens cannot be stored."
        )
    if not all(rows.ids):
        raise ValueError("every row needs an id that is not empty; forget() finds it by that.")


def _checked_query(query: np.ndarray, width: int) -> tuple[np.ndarray, float]:
    q = np.asarray(query, np.float64)
    # A store without rows has no width yet.
    if q.ndim != 1 or (width and q.shape[0] != width):
        raise ValueError(f"a query must be one vector of {width or 'some'} entries; got shape {q.shape}.")
    norm = float(np.linalg.norm(q))
    if not np.isfinite(norm) or norm < 1e-12:
        raise ValueError("a query must be finite and not zero; pool over at least one content token.")
    return q, norm


def exact_hits(vectors: np.ndarray, query: np.ndarray, threshold: float) -> np.ndarray:
    """Indices of vectors whose cosine with the query is at least the threshold, decided in float64.

    Raises:
        ValueError: If the query is not finite, zero, or of another width.
    """
    q, norm = _checked_query(query, vectors.shape[1])
    if not len(vectors):
        return np.zeros(0, np.int64)
    x = vectors.astype(np.float64)
    cosines = (x @ q) / (np.linalg.norm(x, axis=1) * norm).clip(1e-12)
    return np.nonzero(cosines >= threshold)[0]


class VectorStore(Protocol):
    """What a store can do; `open_store` makes one."""

    def add(self, rows: Rows) -> None:
        """Store rows; all of them or none."""

    def load(self) -> Rows:
        """All rows."""

    def search(self, query: np.ndarray, threshold: float) -> list[tuple[str, int]]:
        """(id, slot) of every row with cosine >= threshold, exact, sorted."""

    def delete(self, ids: Sequence[str]) -> int:
        """Erase samples so that nothing of them is left on disk; how many rows went."""

    def __len__(self) -> int: ...


def _sorted_hits(rows: Rows, query: np.ndarray, threshold: float) -> list[tuple[str, int]]:
    return sorted((rows.ids[i], int(rows.slots[i])) for i in exact_hits(rows.vectors, query, threshold))


class NumpyStore:
    """One ``keys.npz`` in a folder, replaced at once; or memory only. Any number of readers, one writer.

    Args:
        folder: Where; None keeps everything in memory.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._path = None if folder is None else Path(folder) / "keys.npz"
        self._memory: Rows | None = None
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)

    def load(self) -> Rows:
        """All rows."""
        if self._path is None or not self._path.is_file():
            empty = Rows([], np.zeros(0, np.int32), np.zeros((0, 0), np.float32), [])
            return self._memory or empty
        with np.load(self._path, allow_pickle=False) as data:
            text = data["ids"].tobytes().decode("utf-8")
            ends = np.cumsum(data["sizes"])
            blob = data["blobs"].tobytes()
            blobs = [blob[b - size : b] for b, size in zip(ends, data["sizes"], strict=True)]
            return Rows(json.loads(text), data["slots"], data["vectors"], blobs)

    def _write(self, rows: Rows) -> None:
        if self._path is None:
            self._memory = rows
            return
        with replacing(self._path) as part, part.open("wb") as file:
            np.savez(
                file,
                ids=np.frombuffer(json.dumps(rows.ids).encode(), np.uint8),
                slots=rows.slots,
                vectors=rows.vectors,
                blobs=np.frombuffer(b"".join(rows.blobs), np.uint8),
                sizes=np.array([len(blob) for blob in rows.blobs], np.int64),
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        if self._path is None:
            yield
            return
        with locked(self._path.with_name("keys.lock")):
            yield

    def add(self, rows: Rows) -> None:
        """Append rows."""
        with self._writing():
            old = self.load()
            check_rows(rows, old.vectors.shape[1] if len(old) else None)
            if not len(old):
                self._write(rows)
                return
            self._write(
                Rows(
                    old.ids + rows.ids,
                    np.concatenate([old.slots, rows.slots]),
                    np.concatenate([old.vectors, rows.vectors]),
                    old.blobs + rows.blobs,
                )
            )

    def search(self, query: np.ndarray, threshold: float) -> list[tuple[str, int]]:
        """Exact scan."""
        return _sorted_hits(self.load(), query, threshold)

    def delete(self, ids: Sequence[str]) -> int:
        """Write the file anew without them."""
        gone = set(ids)
        with self._writing():
            rows = self.load()
            keep = [i for i, name in enumerate(rows.ids) if name not in gone]
            if len(keep) < len(rows):
                self._write(rows.take(keep))
            return len(rows) - len(keep)

    def __len__(self) -> int:
        return len(self.load())


@contextlib.contextmanager
def locked(path: Path, wait: float = 10.0) -> Iterator[None]:
    """Hold a lock file; the operating system frees it when the process dies.

    Raises:
        StoreBusy: If another process holds it for longer than ``wait`` seconds.
    """
    import fcntl

    with path.open("a") as file:
        until = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= until:
                    raise StoreBusy(
                        f"another process writes to {path.parent}; wait for it, or use the lancedb "
                        "store, which takes several writers."
                    ) from error
                time.sleep(0.05)
        yield


class LanceStore:
    """A LanceDB table in a folder or an object store; several processes read and write it.

    Search never uses an approximate index: a miss would be a leak. `delete` writes the table anew and drops
    all older versions: Lance's own delete only marks rows, and their bytes stay in the data files.

    Args:
        uri: Folder or URI of the database.
        table: Name of the table.
    """

    def __init__(self, uri: str | Path, table: str = "keys") -> None:
        try:
            import lancedb
        except ImportError as error:
            raise ImportError(
                'the lancedb store needs the extra: pip install "mmhf-plugins[data]".'
            ) from error
        # Lance shortens a/../b as text, which leads elsewhere where a is a link.
        self._db = lancedb.connect(str(uri if "://" in str(uri) else Path(uri).resolve()))
        self._name = table
        self._table: Any = None

    def _names(self) -> list[str]:
        return list(self._db.list_tables().tables)

    def _arrow(self, rows: Rows) -> Any:
        import pyarrow as pa

        width = rows.vectors.shape[1]
        flat = pa.array(np.ascontiguousarray(rows.vectors, np.float32).ravel())
        return pa.table(
            {
                "id": pa.array(rows.ids, pa.string()),
                "slot": pa.array(rows.slots, pa.int32()),
                "vector": pa.FixedSizeListArray.from_arrays(flat, width),
                "blob": pa.array(rows.blobs, pa.binary()),
            }
        )

    def _width(self) -> int | None:
        return None if self._table is None else self._table.schema.field("vector").type.list_size

    def add(self, rows: Rows) -> None:
        """Append rows in one transaction."""
        self._refresh()
        check_rows(rows, self._width())
        if self._table is None:
            self._table = self._db.create_table(self._name, self._arrow(rows))
        else:
            self._table.add(self._arrow(rows))

    def _refresh(self) -> None:
        # Another process may have written, overwritten or dropped the table.
        self._table = self._db.open_table(self._name) if self._name in self._names() else None

    def load(self) -> Rows:
        """All rows of the latest version."""
        self._refresh()
        if self._table is None:
            return Rows([], np.zeros(0, np.int32), np.zeros((0, 0), np.float32), [])
        return _from_arrow(self._table.to_arrow(), self._width() or 0)

    def search(self, query: np.ndarray, threshold: float) -> list[tuple[str, int]]:
        """Flat scan inside Lance with some slack, decided exactly here."""
        self._refresh()
        if self._table is None or not len(self):
            return []
        _checked_query(query, self._width() or 0)
        # Lance computes in fp32; 1e-4 is far beyond its rounding, and the bound is exclusive.
        near = (
            self._table.search(np.asarray(query, np.float32))
            .distance_type("cosine")
            .bypass_vector_index()
            .distance_range(upper_bound=float(1 - threshold + 1e-4))
            .limit(len(self))
            .select(["id", "slot", "vector", "blob", "_distance"])
            .to_arrow()
        )
        return _sorted_hits(_from_arrow(near, self._width() or 0), query, threshold)

    def delete(self, ids: Sequence[str]) -> int:
        """Write the table anew without them and drop every older version with its files."""
        rows = self.load()
        gone = set(ids)
        keep = [i for i, name in enumerate(rows.ids) if name not in gone]
        if len(keep) == len(rows):
            return 0
        if not keep:
            self._db.drop_table(self._name)
            self._table = None
            return len(rows)
        self._table = self._db.create_table(self._name, self._arrow(rows.take(keep)), mode="overwrite")
        with warnings.catch_warnings():
            # Lance warns that older versions vanish for whoever still reads them; that is what is wanted.
            warnings.simplefilter("ignore", UserWarning)
            self._table.optimize(cleanup_older_than=timedelta(0), delete_unverified=True)
        return len(rows) - len(keep)

    def __len__(self) -> int:
        self._refresh()
        return 0 if self._table is None else self._table.count_rows()


def _from_arrow(table: Any, width: int) -> Rows:
    vectors = table.column("vector").combine_chunks()
    flat = np.asarray(vectors.flatten()) if len(table) else np.zeros(0, np.float32)
    return Rows(
        table.column("id").to_pylist(),
        np.asarray(table.column("slot"), np.int32),
        flat.reshape(len(table), width).astype(np.float32),
        table.column("blob").to_pylist(),
    )


class QdrantStore:
    """A collection of a Qdrant server, for guards on several machines; searched with ``exact=True``.

    Args:
        url: Of the server; ``:memory:`` runs inside the client, for trying out.
        collection: Name.
    """

    def __init__(self, url: str, collection: str = "ppvd") -> None:
        try:
            from qdrant_client import QdrantClient, models
        except ImportError as error:
            raise ImportError("the qdrant store needs its client: pip install qdrant-client.") from error
        self._models = models
        self._client = QdrantClient(location=url) if url == ":memory:" else QdrantClient(url=url)
        self._name = collection

    def _exists(self) -> bool:
        return self._client.collection_exists(self._name)

    def add(self, rows: Rows) -> None:
        """Upsert rows; the collection is made with the first."""
        width = None
        if self._exists():
            width = self._client.get_collection(self._name).config.params.vectors.size
        check_rows(rows, width)
        if width is None:
            params = self._models.VectorParams(
                size=rows.vectors.shape[1], distance=self._models.Distance.COSINE
            )
            self._client.create_collection(self._name, vectors_config=params)
        points = [
            self._models.PointStruct(
                id=str(uuid.uuid5(uuid.NAMESPACE_OID, f"{name}/{slot}")),
                vector=vector.tolist(),
                payload={"id": name, "slot": int(slot), "blob": blob.hex()},
            )
            for name, slot, vector, blob in zip(rows.ids, rows.slots, rows.vectors, rows.blobs, strict=True)
        ]
        for start in range(0, len(points), 256):
            self._client.upsert(self._name, points[start : start + 256], wait=True)

    def load(self) -> Rows:
        """All rows, page by page."""
        found: list[Any] = []
        offset = None
        while self._exists():
            page, offset = self._client.scroll(
                self._name, limit=1000, offset=offset, with_vectors=True, with_payload=True
            )
            found += page
            if offset is None:
                break
        return self._rows(found)

    def _rows(self, points: Sequence[Any]) -> Rows:
        vectors = np.array([point.vector for point in points], np.float32)
        return Rows(
            [point.payload["id"] for point in points],
            np.array([point.payload["slot"] for point in points], np.int32),
            vectors.reshape(len(points), -1),
            [bytes.fromhex(point.payload["blob"]) for point in points],
        )

    def search(self, query: np.ndarray, threshold: float) -> list[tuple[str, int]]:
        """The server's exact scan with some slack, decided here."""
        if not self._exists() or not len(self):
            return []
        width = self._client.get_collection(self._name).config.params.vectors.size
        _checked_query(query, width)
        near = self._client.query_points(
            self._name,
            query=np.asarray(query, np.float32).tolist(),
            search_params=self._models.SearchParams(exact=True),
            score_threshold=float(threshold - 1e-4),
            limit=len(self),
            with_vectors=True,
        ).points
        return _sorted_hits(self._rows(near), query, threshold)

    def delete(self, ids: Sequence[str]) -> int:
        """Delete the points; the server frees their space when it optimises its segments."""
        before = len(self)
        if before:
            match = self._models.FieldCondition(key="id", match=self._models.MatchAny(any=list(ids)))
            self._client.delete(
                self._name, self._models.FilterSelector(filter=self._models.Filter(must=[match]))
            )
        return before - len(self)

    def __len__(self) -> int:
        return self._client.count(self._name, exact=True).count if self._exists() else 0


class Sealed:
    """Another store behind AES-256-GCM: it sees ids under a hash, random directions and ciphertext only.

    The key never lies beside the data. Search runs over the unsealed matrix in memory.

    Args:
        inner: The store.
        key: 32 bytes.
    """

    _WIDTH = 8

    def __init__(self, inner: VectorStore, key: bytes) -> None:
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as error:
            raise ImportError(
                'protect="encrypt" needs the extra: pip install "mmhf-plugins[tee]".'
            ) from error
        if len(key) != 32:
            raise ValueError(
                f"the key must be 32 bytes; got {len(key)}. Make one with secrets.token_bytes(32)."
            )
        self._inner, self._cipher, self._key = inner, AESGCM(key), key

    def _alias(self, name: str) -> str:
        import hmac

        return hmac.new(self._key, b"id:" + name.encode(), "sha256").hexdigest()[:32]

    def add(self, rows: Rows) -> None:
        """Seal and store."""
        check_rows(rows, None)
        sealed = []
        for name, slot, vector, blob in zip(rows.ids, rows.slots, rows.vectors, rows.blobs, strict=True):
            head = json.dumps({"id": name, "slot": int(slot), "width": len(vector)}).encode()
            plain = len(head).to_bytes(4, "big") + head + vector.astype("<f4").tobytes() + blob
            nonce = secrets.token_bytes(12)
            sealed.append(nonce + self._cipher.encrypt(nonce, plain, b"mmhf.ppvd.v1"))
        aliases = [self._alias(name) for name in rows.ids]
        # The store wants vectors to tell rows apart; these say nothing.
        noise = np.random.default_rng().normal(size=(len(rows), self._WIDTH)).astype(np.float32)
        self._inner.add(Rows(aliases, rows.slots, noise, sealed))

    def load(self) -> Rows:
        """Unseal everything.

        Raises:
            ValueError: If the key is wrong or the data were changed.
        """
        from cryptography.exceptions import InvalidTag

        names: list[str] = []
        slots: list[int] = []
        vectors: list[np.ndarray] = []
        blobs: list[bytes] = []
        for data in self._inner.load().blobs:
            try:
                plain = self._cipher.decrypt(data[:12], data[12:], b"mmhf.ppvd.v1")
            except InvalidTag as error:
                raise ValueError(
                    "the store does not open with this key, or its data were changed; give the key "
                    "it was written with."
                ) from error
            size = int.from_bytes(plain[:4], "big")
            head = json.loads(plain[4 : 4 + size])
            end = 4 + size + 4 * head["width"]
            names.append(head["id"])
            slots.append(head["slot"])
            vectors.append(np.frombuffer(plain[4 + size : end], "<f4"))
            blobs.append(plain[end:])
        matrix = np.stack(vectors) if vectors else np.zeros((0, 0), np.float32)
        return Rows(names, np.array(slots, np.int32), matrix, blobs)

    def search(self, query: np.ndarray, threshold: float) -> list[tuple[str, int]]:
        """Exact scan over the unsealed rows."""
        return _sorted_hits(self.load(), query, threshold)

    def delete(self, ids: Sequence[str]) -> int:
        """Erase by alias."""
        return self._inner.delete([self._alias(name) for name in ids])

    def __len__(self) -> int:
        return len(self._inner)


def open_store(kind: str, place: str | Path | None, *, key: bytes | None = None) -> VectorStore:
    """A store by name.

    Args:
        kind: ``lancedb``, ``numpy`` or ``qdrant``.
        place: Folder, URI or URL; None is memory (numpy only).
        key: Seals what is stored.

    Returns:
        The store.

    Raises:
        ValueError: If there is no such kind, or the kind needs a place.
    """
    if kind not in STORES:
        raise ValueError(f"store must be one of {', '.join(STORES)}; got {kind!r}.")
    if place is None and kind != "numpy":
        raise ValueError(f"the {kind} store needs a place: a folder or URL. Only numpy runs in memory.")
    inner: VectorStore
    if kind == "numpy":
        inner = NumpyStore(place)
    elif kind == "lancedb":
        inner = LanceStore(str(place))
    else:
        inner = QdrantStore(str(place))
    return inner if key is None else Sealed(inner, key)
