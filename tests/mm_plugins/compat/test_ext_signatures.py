"""The names and arguments under which ``mmcv.ops`` calls, against the bindings that mmcv itself ships."""

import inspect
import re
from pathlib import Path

import mmcv.ops
import pytest
import torch

import mm_plugins  # noqa: F401
from mm_plugins.compat.ops_table import OP_NAMES
from mm_plugins.compat.portable import ext_signatures


def bound_arguments() -> dict[str, list[str]]:
    """Argument names of every function in mmcv's ``pybind.cpp``, which its wheels carry as text."""
    source = (Path(mmcv.ops.__file__).parent / "csrc/pytorch/pybind.cpp").read_text()
    return {
        name: re.findall(r'py::arg\("(\w+)"\)', body)
        for name, body in re.findall(r'm\.def\(\s*"(\w+)"([^;]*);', source)
    }


@pytest.mark.parametrize("name", OP_NAMES)
def test_arguments_are_those_of_the_bindings(name: str) -> None:
    parameters = inspect.signature(getattr(ext_signatures, name)).parameters.values()
    names = [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert names == bound_arguments()[name]


def test_gradients_are_added_to_the_buffers() -> None:
    """A buffer of ones grows by the gradient, as it does in mmcv's kernels."""
    rois = torch.tensor([[0.0, 0, 0, 2, 2]])
    none = torch.zeros(0)
    grad = torch.ones(1, 1, 1, 1)
    buffer = torch.ones(1, 1, 4, 4)
    ext_signatures.roi_align_backward(grad, rois, none, none, buffer, 1, 1, 1.0, 1, 1, True)
    assert float(buffer.sum()) == pytest.approx(17.0)
    weight = torch.ones(1, 1, 1, 1)
    x, offset, top = torch.full((1, 1, 2, 2), 3.0), torch.zeros(1, 2, 2, 2), torch.ones(1, 1, 2, 2)
    # Gradient of a 1 x 1 kernel: the sum of the input, 4 * 3, times scale 2, on top of the 1 that was there.
    ext_signatures.deform_conv_backward_parameters(
        x, offset, top, weight, none, none, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 2.0, 1
    )
    assert weight.item() == pytest.approx(25.0)


def test_versions_are_plain_strings() -> None:
    from mmcv.ops import get_compiler_version, get_compiling_cuda_version

    assert get_compiler_version() == "none (portable ops of mm_plugins.compat)"
    assert get_compiling_cuda_version() == "not available"
