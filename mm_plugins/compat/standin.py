"""Stand-in for mmcv's compiled module ``mmcv._ext``, so that the plain ``mmcv-lite`` wheel serves
``mmcv.ops``.

``mmcv-lite`` ships the Python half of ``mmcv.ops``; each file of it asks ``mmcv._ext`` for functions by name
and calls them with the C++ signatures (output buffers are arguments). This module answers those names with
portable functions.
"""

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable

EXT_NAME = "mmcv._ext"


def missing_op(name: str) -> Callable[..., None]:
    """A function that says which op is missing and how to get it, at the call and not at import."""

    def _raise(*args: object, **kwargs: object) -> None:
        raise NotImplementedError(
            f"mmcv op {name!r} has no portable version in mm_plugins.compat. Install a compiled mmcv==2.1.0 "
            "in place of mmcv-lite (`pip uninstall mmcv-lite && pip install mmcv==2.1.0`, compiles for about "
            "an hour), or choose a model that does not use it; `mmhf doctor` lists the ops that are served."
        )

    _raise.__name__ = name
    return _raise


class StandIn(types.ModuleType):
    """Module object that answers every op name: with a portable op, or with one that raises."""

    def __init__(self, ops: dict[str, Callable]) -> None:
        super().__init__(EXT_NAME, __doc__)
        self.__spec__ = importlib.machinery.ModuleSpec(EXT_NAME, loader=None, origin=__name__)
        self.__file__ = __file__
        self.portable_ops = dict(ops)
        self.__dict__.update(ops)

    def __getattr__(self, name: str) -> Callable:
        # Dunder look-ups (inspect, pickle, doctest) must fail as on any module.
        if name.startswith("__"):
            raise AttributeError(name)
        return missing_op(name)


def has_compiled_ext() -> bool:
    """Whether a compiled ``mmcv._ext`` is installed (a stand-in of ours does not count)."""
    loaded = sys.modules.get(EXT_NAME)
    if loaded is not None:
        return not isinstance(loaded, StandIn)
    return importlib.util.find_spec(EXT_NAME) is not None


def install(ops: dict[str, Callable]) -> bool:
    """Put the stand-in into ``sys.modules`` unless a compiled module is there; True if it serves."""
    if has_compiled_ext():
        return False
    if EXT_NAME not in sys.modules:
        module = StandIn(ops)
        sys.modules[EXT_NAME] = module
        sys.modules["mmcv"]._ext = module  # type: ignore[attr-defined]
    return True
