"""The stand-in for ``mmcv._ext``: installed once, honest about what it lacks, behind a compiled module."""

import subprocess
import sys

import pytest

import mm_plugins  # noqa: F401
from mm_plugins.compat import PORTABLE_OPS, STANDIN_SERVES, op_backends
from mm_plugins.compat.standin import EXT_NAME, StandIn, install

needs_standin = pytest.mark.skipif(not STANDIN_SERVES, reason="a compiled mmcv serves the ops here")


@needs_standin
def test_mmcv_ops_asks_the_standin() -> None:
    import mmcv.ops  # noqa: F401

    # mmcv.ops.nms the module is hidden by nms the function.
    ext_module = sys.modules["mmcv.ops.nms"].ext_module
    assert ext_module is sys.modules[EXT_NAME]
    assert ext_module.nms is PORTABLE_OPS["nms"]


@needs_standin
def test_missing_op_names_itself_and_the_cure() -> None:
    op = sys.modules[EXT_NAME].some_rare_op
    with pytest.raises(NotImplementedError, match="'some_rare_op' has no portable version"):
        op(1, 2)


@needs_standin
def test_second_install_changes_nothing() -> None:
    before = sys.modules[EXT_NAME]
    assert install({}) is True
    assert sys.modules[EXT_NAME] is before


def test_dunder_lookups_fail_as_on_any_module() -> None:
    with pytest.raises(AttributeError):
        StandIn({}).__wrapped__  # noqa: B018


def test_every_op_has_a_backend() -> None:
    assert set(op_backends()) == set(PORTABLE_OPS)
    assert set(op_backends().values()) <= {"portable", "torchvision"}


def test_compiled_module_is_preferred() -> None:
    """With a module of that name already loaded (what a compiled mmcv is), nothing is replaced."""
    # By file: mm_plugins/__init__ would load mmcv.ops against the empty module.
    path = sys.modules["mm_plugins.compat.standin"].__file__
    code = f"""
import importlib.util, sys, types
ext = sys.modules["mmcv._ext"] = types.ModuleType("mmcv._ext")
spec = importlib.util.spec_from_file_location("standin", {path!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.has_compiled_ext() and module.install({{}}) is False and sys.modules["mmcv._ext"] is ext
print("kept")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "kept", done.stderr
