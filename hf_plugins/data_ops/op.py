"""The contract of operators: what one is, how it is named and fingerprinted, what it must account for."""

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_from_disk

from hf_plugins.data_ops.text import join_text
from hf_plugins.whole_files import replacing

ROW_ID = "row_id"
"""Column that names a row through all operators."""

Action = Literal["dropped", "changed", "added", "flagged"]
_SCHEMA = pa.schema(
    [("op", "string"), (ROW_ID, "string"), ("action", "string"), ("reason", "string"), ("value", "float64")]
)


def canonical(value: Any) -> str:
    """One JSON text for equal values: sorted keys, no blanks, non-ASCII kept."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=str)


def digest(*parts: str) -> str:
    """SHA-256 of parts that cannot run into each other, as hexadecimal."""
    whole = hashlib.sha256()
    for part in parts:
        # surrogatepass: what JSON may hold must have a hash, even where it is no valid text.
        data = part.encode("utf-8", "surrogatepass")
        whole.update(len(data).to_bytes(8, "big") + data)
    return whole.hexdigest()


@dataclass
class Ledger:
    """What happened to rows: every dropped, changed, added or flagged row with its reason.

    Holds ids, reasons and figures, never the text of a row.
    """

    entries: list[tuple[str, str, str, str, float | None]] = field(default_factory=list)

    def add(self, op: str, row_id: str, action: Action, reason: str = "", value: float | None = None) -> None:
        """Record one row."""
        self.entries.append((op, row_id, action, reason, value))

    def extend(self, other: "Ledger") -> None:
        """Take over another ledger's records."""
        self.entries += other.entries

    def rows(self, *, op: str | None = None, action: Action | None = None) -> list[dict[str, Any]]:
        """Records as dicts with ``op``, ``row_id``, ``action``, ``reason``, ``value``; filtered if asked."""
        names = _SCHEMA.names
        return [
            dict(zip(names, entry, strict=True))
            for entry in self.entries
            if (op is None or entry[0] == op) and (action is None or entry[2] == action)
        ]

    def counts(self) -> dict[tuple[str, str], int]:
        """Number of records for each (op, action)."""
        return dict(Counter((entry[0], entry[2]) for entry in self.entries))

    def save(self, path: str | Path) -> Path:
        """Write the records as one parquet file, placed at once."""
        path = Path(path)
        columns = list(zip(*self.entries, strict=True)) or [()] * len(_SCHEMA.names)
        table = pa.table(
            {n: pa.array(c, t) for n, t, c in zip(_SCHEMA.names, _SCHEMA.types, columns, strict=True)}
        )
        with replacing(path) as part:
            pq.write_table(table, part)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Ledger":
        """Read what `save` wrote."""
        table = pq.read_table(path).to_pydict()
        return cls(list(zip(*(table[name] for name in _SCHEMA.names), strict=True)))


@dataclass
class OpContext:
    """What operators share while they run, none of it part of a row's fate except the clients' identity."""

    ledger: Ledger = field(default_factory=Ledger)
    num_proc: int | None = None
    """Processes for row-wise work (``datasets.map``); None works in this process."""
    clients: Mapping[str, Any] = field(default_factory=dict)
    """`ChatClient` by role (``scorer``, ``optimizer``, ``writer``, ...); ``default`` serves the rest."""
    progress: Callable[[str, int, int], None] | None = None
    """Told (what, done, total) during long work."""

    def client(self, role: str) -> Any:
        """The client of a role.

        Raises:
            ValueError: If neither the role nor ``default`` has one.
        """
        found = self.clients.get(role) or self.clients.get("default")
        if found is None:
            raise ValueError(
                f"an operator asks a language model as {role!r}, and no client serves that role; give "
                f"OpContext(clients={{'default': OpenAIChat(...)}}) or a client for {role!r}."
            )
        return found


@dataclass(frozen=True, kw_only=True)
class DataOp:
    """One operator: a name, parameters, and a function from a data set to a data set.

    A subclass is a frozen keyword-only dataclass whose fields are the parameters (plain values, so that
    recipes can hold them), sets ``name`` (Data-Juicer's where it has the operator) and ``version`` (raised
    when results move), and writes `apply`. It never draws on hidden randomness: a ``seed`` is a parameter.
    """

    name: ClassVar[str] = ""
    version: ClassVar[int] = 1
    roles: ClassVar[tuple[str, ...]] = ()
    """Roles of language models that it asks; their identity and prompts enter the fingerprint."""
    idempotent: ClassVar[bool] = True
    """Whether a second run changes nothing."""

    def params(self) -> dict[str, Any]:
        """The parameters as plain values."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}

    def spec(self) -> dict[str, Any]:
        """The operator as a recipe writes it: ``{name: params}``."""
        return {self.name: self.params()}

    def prompts(self) -> tuple[str, ...]:
        """Prompt templates that shape its answers; part of the fingerprint."""
        return ()

    def materials(self) -> tuple[str, ...]:
        """Hashes of files that shape its result (a model, an evaluation set); part of the fingerprint."""
        return ()

    def fingerprint(self, context: OpContext | None = None) -> str:
        """Hash of everything that decides the result but the rows.

        Name, version, parameters, prompt templates, files, and the identity of the clients it asks.
        """
        clients = [context.client(role).identity for role in self.roles] if context is not None else []
        return digest(
            self.name,
            str(self.version),
            canonical(self.params()),
            canonical(self.prompts()),
            canonical(self.materials()),
            canonical(clients),
        )

    def run(self, dataset: Dataset, context: OpContext | None = None) -> Dataset:
        """Apply the operator.

        Rows get a ``row_id`` (hash of the content) if they have none; columns that the operator does not
        name stay as they are.

        Args:
            dataset: The rows.
            context: Ledger, processes, clients.

        Returns:
            The remaining and new rows.

        Raises:
            ValueError: If a column it needs is missing.
            RuntimeError: If it lost a row without a record; that is a fault of the operator.
        """
        context = context or OpContext()
        missing = [name for name in self.columns() if name not in dataset.column_names]
        if missing:
            raise ValueError(
                f"{self.name}: no column {', '.join(missing)}; the data set has "
                f"{', '.join(dataset.column_names)}. Name the columns in the operator's parameters."
            )
        dataset = with_row_ids(dataset)
        start = len(context.ledger.entries)
        result = self.apply(dataset, context)
        _check_account(self.name, dataset, result, context.ledger.entries[start:])
        return result

    def columns(self) -> tuple[str, ...]:
        """Columns that must be there."""
        key = getattr(self, "text_key", ())
        return (key,) if isinstance(key, str) else tuple(key)

    def apply(self, dataset: Dataset, context: OpContext) -> Dataset:
        """The work itself; `run` has checked columns and given ids. Written by each operator."""
        raise NotImplementedError(f"{type(self).__name__} must write apply(dataset, context).")


def _check_account(name: str, before: Dataset, after: Dataset, entries: Sequence[tuple[Any, ...]]) -> None:
    """Kept + dropped = input, added = new, each id once."""
    old, new = set(before[ROW_ID]), list(after[ROW_ID])
    dropped = Counter(entry[1] for entry in entries if entry[2] == "dropped")
    added = {entry[1] for entry in entries if entry[2] == "added"}
    gone = old - set(new)
    if gone != set(dropped) or max(dropped.values(), default=1) > 1 or set(new) - old != added:
        raise RuntimeError(
            f"{name} does not account for its rows: {len(gone)} rows are gone and {len(dropped)} recorded as "
            f"dropped, {len(set(new) - old)} are new and {len(added)} recorded as added. Record each once in "
            "context.ledger."
        )
    if len(new) != len(set(new)):
        raise RuntimeError(
            f"{name} returned a row_id twice; give new rows new ids (digest of parents and seed)."
        )


def with_row_ids(dataset: Dataset) -> Dataset:
    """The data set with a ``row_id`` column: hash of the row's content, numbered among equal rows.

    An id does not depend on the row's place, so records of an earlier run still fit after rows are added.
    """
    if ROW_ID in dataset.column_names:
        return dataset
    seen: Counter[str] = Counter()
    ids = []
    for row in dataset:
        content = digest(canonical(row))[:20]
        ids.append(f"{content}-{seen[content]}" if seen[content] else content)
        seen[content] += 1
    return dataset.add_column(ROW_ID, ids)


def content_key(dataset: Dataset) -> str:
    """Hash of columns and rows in order, the key of a chain's start; equal content gives equal keys."""
    whole = hashlib.sha256(canonical(sorted(dataset.column_names)).encode())
    for row in dataset:
        whole.update(digest(canonical(row)).encode())
    return whole.hexdigest()


_OPS: dict[str, type[DataOp]] = {}
_Op = TypeVar("_Op", bound=type[DataOp])


def register(cls: _Op) -> _Op:
    """Class decorator: make an operator known to recipes by its name.

    Raises:
        ValueError: If the name is missing or taken by another class.
    """
    if not cls.name:
        raise ValueError(f"{cls.__name__} has no name; set the class variable name before registering it.")
    taken = _OPS.get(cls.name)
    if taken is not None and taken.__qualname__ != cls.__qualname__:
        raise ValueError(
            f"the operator name {cls.name!r} is taken by {taken.__module__}.{taken.__qualname__}; choose "
            "another."
        )
    _OPS[cls.name] = cls
    return cls


def operators() -> dict[str, type[DataOp]]:
    """All registered operators by name."""
    return dict(sorted(_OPS.items()))


def make_op(spec: str | Mapping[str, Any]) -> DataOp:
    """An operator from a recipe's entry: ``name`` or ``{name: {parameter: value}}``.

    Raises:
        ValueError: If the entry names no operator or parameter; the message lists the nearest.
    """
    if isinstance(spec, str):
        spec = {spec: None}
    if not isinstance(spec, Mapping) or len(spec) != 1:
        raise ValueError(f"an operator in a recipe is NAME or {{NAME: {{parameter: value}}}}; got {spec!r}.")
    ((name, params),) = spec.items()
    cls = _OPS.get(name)
    if cls is None:
        near = get_close_matches(str(name), _OPS, n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else f" There are {', '.join(sorted(_OPS))}."
        raise ValueError(f"no operator {name!r}.{hint}")
    params = dict(params or {})
    fields = {item.name for item in dataclasses.fields(cls)}
    unknown = sorted(set(params) - fields)
    if unknown:
        raise ValueError(
            f"{name} has no parameter {', '.join(unknown)}; it takes {', '.join(sorted(fields)) or 'none'}."
        )
    # YAML writes lists where a frozen operator holds tuples.
    hints = get_type_hints(cls)
    for key, value in params.items():
        kinds = {get_origin(hints[key]), *(get_origin(arg) for arg in get_args(hints[key]))}
        if isinstance(value, list) and tuple in kinds:
            params[key] = tuple(value)
    return cls(**params)


def row_texts(batch: Mapping[str, Sequence[Any]], text_key: str | Sequence[str]) -> list[str]:
    """Texts of a batch of columns, several columns joined by a line end."""
    keys = (text_key,) if isinstance(text_key, str) else tuple(text_key)
    rows = zip(*(batch[key] for key in keys), strict=True)
    return ["\n".join(filter(None, map(join_text, row))) for row in rows]


def select_rows(
    dataset: Dataset,
    reasons: Sequence[str | None],
    context: OpContext,
    op: str,
    values: Sequence[float | None] | None = None,
) -> Dataset:
    """Keep rows without a reason; record the others as dropped with theirs."""
    ids = dataset[ROW_ID]
    for index, reason in enumerate(reasons):
        if reason is not None:
            context.ledger.add(op, ids[index], "dropped", reason, None if values is None else values[index])
    return dataset.select([index for index, reason in enumerate(reasons) if reason is None])


def run_ops(
    dataset: Dataset,
    ops: Iterable[DataOp],
    context: OpContext | None = None,
    *,
    work_dir: str | Path | None = None,
) -> Dataset:
    """Run operators one after the other, keeping each result under its content key.

    ``key_k = H(key_{k-1} || fingerprint of operator k)`` and ``key_0`` hashes the rows, so an interrupted run
    goes on behind the last finished operator, and two chains with a common beginning share it.

    Args:
        dataset: The rows.
        ops: Operators in order.
        context: Ledger, processes, clients; the ledger receives the records of stored steps too.
        work_dir: Where results are kept (``KEY/``: Arrow data and ``ledger.parquet``); None keeps nothing.

    Returns:
        The rows after the last operator.
    """
    context = context or OpContext()
    dataset = with_row_ids(dataset)
    key = content_key(dataset) if work_dir is not None else ""
    for op in ops:
        if work_dir is None:
            dataset = op.run(dataset, context)
            continue
        key = digest(key, op.fingerprint(context))
        folder = Path(work_dir) / key[:32]
        if not (folder / "ledger.parquet").is_file():
            inner = dataclasses.replace(context, ledger=Ledger())
            _store(op.run(dataset, inner), inner.ledger, folder)
        context.ledger.extend(Ledger.load(folder / "ledger.parquet"))
        dataset = load_from_disk(str(folder))
    return dataset


def _store(dataset: Dataset, ledger: Ledger, folder: Path) -> None:
    """Write beside and rename: a killed run leaves no half result, and of two runs the first one wins."""
    aside = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.part")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        dataset.save_to_disk(str(aside))
        ledger.save(aside / "ledger.parquet")
        try:
            os.rename(aside, folder)
        except OSError:
            # Another process finished the same step first: its result is ours.
            if not (folder / "ledger.parquet").is_file():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
