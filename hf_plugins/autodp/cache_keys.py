"""Content keys: what was computed from what, so that equal work is done once, by anyone."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no blanks; the same value always gives the same text.

    Raises:
        ValueError: If the value is no JSON, or holds NaN or an infinity.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"a cache key needs plain JSON values: {error}. Use numbers, strings and lists."
        ) from error


def digest(*parts: str) -> str:
    """SHA-256 of some texts, each preceded by its length so that no two lists of parts give one input."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        state.update(f"{len(data)}:".encode())
        state.update(data)
    return state.hexdigest()


def rows_key(rows: Iterable[Mapping[str, Any]]) -> str:
    """Fingerprint of a table: every cell of every row, in order."""
    state = hashlib.sha256()
    for row in rows:
        state.update(bytes.fromhex(digest(canonical_json(row))))
    return state.hexdigest()


def step_key(
    parent: str,
    *,
    name: str,
    version: str,
    params: Mapping[str, Any],
    prompt: str = "",
    model: str = "",
    revision: str = "",
    seed: int = 0,
) -> str:
    """Key of the output of one step: its input's key and everything that can change what it does."""
    recipe = {
        "name": name,
        "version": version,
        "params": dict(params),
        "prompt": digest(prompt),
        "model": model,
        "revision": revision,
        "seed": seed,
    }
    return digest(parent, canonical_json(recipe))
