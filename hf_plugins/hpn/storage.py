"""What a search keeps on disk: the anchors of the trajectory, and states that a kill cannot tear."""

import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hf_plugins.whole_files import replacing

Figures = dict[int, tuple[float, int]]
"""Client to (figure, records behind it)."""
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors and plain values beside and rename."""
    with replacing(path) as part, part.open("wb") as file:
        torch.save(dict(state), file)


def load_state(path: Path) -> dict[str, Any] | None:
    """What `save_state` wrote, or None if there is no such file."""
    return torch.load(path, weights_only=True) if path.is_file() else None


class AnchorTrajectory:
    """Global models of the anchor run, one file a kept round, and what every client measured of them.

    ``anchor r`` is the model after r aggregations, r = 0 the initial one; ``figures(r)`` belong to it. The
    figures of all rounds are kept, also where the model is not.
    """

    def __init__(
        self,
        folder: Path,
        *,
        store: Literal["all", "every_n", "diff"] = "all",
        every: int = 10,
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    ) -> None:
        """Args:
        folder: Where the files lie.
        store: ``all`` rounds; ``every_n``: only those that ``every`` divides; ``diff``: all, each as its
            compressed bitwise difference to round 0, restored bit for bit.
        every: n of ``every_n``.
        dtype: Precision on disk.
        """
        self.folder = Path(folder)
        self.store, self.every, self.dtype = store, every, _DTYPES[dtype]
        self.aggregate: dict[int, Figures] = {}
        self.local: dict[int, Figures] = {}

    def _path(self, round_index: int) -> Path:
        return self.folder / f"anchor_{round_index:06d}.pt"

    def keeps(self, round_index: int) -> bool:
        """Whether the model of this round is (to be) on disk."""
        return self.store != "every_n" or round_index % self.every == 0

    def put(self, round_index: int, vector_D: Tensor) -> None:
        """Store a model, if its round is one that is kept."""
        if not self.keeps(round_index):
            return
        value_D = vector_D.to(self.dtype)
        if self.store == "diff" and round_index > 0:
            packed = _pack(_bytes(value_D) ^ _bytes(self._raw(0)), self.dtype.itemsize)
            save_state(self._path(round_index), {"packed": packed, "shape": list(value_D.shape)})
        else:
            save_state(self._path(round_index), {"vector": value_D})

    def get(self, round_index: int) -> Tensor:
        """The model of a kept round, float32.

        Raises:
            FileNotFoundError: If it is not there.
        """
        return self._raw(round_index).float()

    def _raw(self, round_index: int) -> Tensor:
        state = load_state(self._path(round_index))
        if state is None:
            raise FileNotFoundError(
                f"{self._path(round_index)} is missing; run the anchor phase again (`mmhf hpn search` resumes"
                " it), or choose a round that the store keeps."
            )
        if "vector" in state:
            return state["vector"]
        bits = _unpack(state["packed"], self.dtype.itemsize) ^ _bytes(self._raw(0))
        return bits.view(self.dtype).reshape(state["shape"])

    def has(self, round_index: int) -> bool:
        """Whether the model of this round is on disk."""
        return self._path(round_index).is_file()

    def starts(self, num_rounds: int) -> list[int]:
        """Rounds that a search can start from: those kept, without the last model."""
        return [r for r in range(num_rounds) if self.keeps(r)]

    def mean(self, round_index: int) -> float:
        """Mean figure of a round's model over clients, weighted by records."""
        return weighted_mean(self.aggregate[round_index])

    def state_dict(self) -> dict[str, Any]:
        """All figures."""
        return {"aggregate": dict(self.aggregate), "local": dict(self.local)}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Replace the figures by saved ones."""
        self.aggregate = {r: dict(f) for r, f in state["aggregate"].items()}
        self.local = {r: dict(f) for r, f in state["local"].items()}


def weighted_mean(figures: Figures) -> float:
    """Mean over clients, weighted by records; NaN without any."""
    total = sum(count for _, count in figures.values())
    return sum(value * count for value, count in figures.values()) / total if total else math.nan


def _bytes(vector: Tensor) -> Tensor:
    return vector.contiguous().flatten().view(torch.uint8)


def _pack(bits: Tensor, itemsize: int) -> Tensor:
    # Byte planes: exponents stand together, which is where two models of one run agree.
    planes = bits.reshape(-1, itemsize).T.contiguous().numpy().tobytes()
    return torch.frombuffer(bytearray(zlib.compress(planes, 6)), dtype=torch.uint8)


def _unpack(packed: Tensor, itemsize: int) -> Tensor:
    planes = torch.frombuffer(bytearray(zlib.decompress(packed.numpy().tobytes())), dtype=torch.uint8)
    return planes.reshape(itemsize, -1).T.contiguous().flatten()
