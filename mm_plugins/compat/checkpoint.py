"""Load the checkpoints that mmengine's own Runner writes, on PyTorch >= 2.6, without opening the door to
pickles.

Since 2.6 ``torch.load`` refuses every object that is not a tensor or a plain container, and a Runner
checkpoint holds more: the log history (``HistoryBuffer``, NumPy arrays, ``getattr`` of its own methods) and
scheduler classes. mmengine 0.10.7 has no answer (mmengine issue 1655). The loader here keeps
``weights_only=True`` and adds exactly these objects to PyTorch's allow-list for the duration of one load.
``getattr`` itself is replaced by a function that hands out the few methods such a file names and nothing
else. A pickle that names anything else is refused, as PyTorch does by default, so no file is trusted more
than before.
"""

import contextlib
import importlib
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mmengine.optim.scheduler as schedulers
import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

# A Runner pickles bound names through getattr: the log statistics, and the curve of a one-cycle schedule.
_PICKLED_METHODS: dict[type, frozenset[str]] = {
    HistoryBuffer: frozenset({"min", "max", "current", "mean"}),
    schedulers.OneCycleParamScheduler: frozenset({"_annealing_cos", "_annealing_linear"}),
}


def pickled_method(owner: type, name: str) -> Callable[..., Any]:
    """``getattr`` for the uses a Runner checkpoint has for it; takes the place of the free one while loading.

    Raises:
        ValueError: For any other owner or name; a pickle could reach arbitrary code through a free
        ``getattr``.
    """
    if name not in _PICKLED_METHODS.get(owner, ()):
        raise ValueError(
            f"checkpoint asks for attribute {name!r} of {owner!r}, which no Runner writes. "
            "Do not load this file unless you trust its origin."
        )
    return getattr(owner, name)


def _numpy_rebuilders() -> list[tuple[Callable[..., Any], str]]:
    """NumPy's pickle entry points under the names that NumPy 1 and NumPy 2 write."""
    array = importlib.import_module("numpy._core.multiarray")
    names = [(array._reconstruct, "_reconstruct"), (array.scalar, "scalar")]
    return [(func, f"numpy.{core}.multiarray.{name}") for func, name in names for core in ("core", "_core")]


def runner_globals() -> list[Any]:
    """What a Runner checkpoint names besides tensors; for ``torch.serialization.safe_globals``."""
    scheduler_classes = [cls for cls in vars(schedulers).values() if isinstance(cls, type)]
    dtypes = [np.dtype, *{type(np.dtype(code)) for code in "?bhilqBHILQefdgFDU"}]
    return [
        HistoryBuffer,
        (pickled_method, "builtins.getattr"),
        *_numpy_rebuilders(),
        np.ndarray,
        *dtypes,
        *scheduler_classes,
    ]


@contextlib.contextmanager
def runner_checkpoints_allowed() -> Iterator[None]:
    """Inside this block ``torch.load(weights_only=True)`` accepts what mmengine's Runner writes."""
    with torch.serialization.safe_globals(runner_globals()):
        yield


def load_checkpoint(source: str | Path | io.BytesIO, map_location: Any = None) -> dict[str, Any]:
    """Read one Runner checkpoint or state dict with ``weights_only=True`` and the allow-list above.

    Args:
        source: Path of a local file, or a buffer that holds one.
        map_location: As for ``torch.load``.

    Raises:
        FileNotFoundError: If the path names no file.
        RuntimeError: If the file is damaged, or a pickle that names more than a Runner writes.
    """
    if isinstance(source, str | Path):
        source = Path(source).expanduser()
        if not source.is_file():
            raise FileNotFoundError(
                f"checkpoint {str(source)!r} does not exist (working directory {str(Path.cwd())!r}). "
                "Give the path of a .pth file; `ls` the work_dir for the ones a run has written."
            )
    try:
        with runner_checkpoints_allowed():
            return torch.load(source, map_location=map_location, weights_only=True)
    except (ValueError, RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise RuntimeError(
            f"cannot load checkpoint {str(source)!r}: {_reason(error)} Either the file is damaged (take the "
            "one before it), or it is a pickle that names more than a Runner writes. If you trust its "
            "origin, allow the class before loading: `torch.serialization.add_safe_globals([Class])`."
        ) from error


def _reason(error: BaseException) -> str:
    """The line that names the object; PyTorch wraps it in advice to switch the protection off."""
    lines = str(error).splitlines() or [type(error).__name__]
    return next((line.strip() for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0])


def _load_from_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    # mmengine logs the part of this name that follows "load_from_" (its position 10).
    return load_checkpoint(filename, map_location)


_load_from_local.__name__ = "load_from_local"


def register_loader() -> None:
    """Make the loader above mmengine's loader of local files, through mmengine's own registry; idempotent."""
    CheckpointLoader.register_scheme(prefixes="", loader=_load_from_local, force=True)
