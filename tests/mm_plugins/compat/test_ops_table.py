"""Which backend serves which op."""

import importlib.util
import sys
import types

import mmcv
import pytest
import torch

import mm_plugins  # noqa: F401
from mm_plugins.compat import ops_table
from mm_plugins.compat.portable import ext_signatures
from mm_plugins.compat.standin import StandIn

has_torchvision = importlib.util.find_spec("torchvision") is not None


def test_names_are_sorted_and_served() -> None:
    assert list(ops_table.OP_NAMES) == sorted(ops_table.OP_NAMES)
    assert set(ops_table.PORTABLE_OPS) == set(ops_table.OP_NAMES) == set(ops_table.op_backends())
    assert isinstance(mmcv._ext, StandIn)
    assert mmcv._ext.nms is ops_table.PORTABLE_OPS["nms"]


def test_ops_that_no_zoo_model_uses_say_how_to_get_them() -> None:
    from mmcv.ops import nms_rotated

    with pytest.raises(NotImplementedError, match=r"'nms_rotated'.*Install a compiled mmcv==2\.1\.0"):
        nms_rotated(torch.zeros(1, 5), torch.zeros(1), 0.5)


@pytest.mark.skipif(has_torchvision, reason="torchvision is installed")
def test_portable_without_torchvision() -> None:
    assert ops_table.torchvision_ops() == {}
    assert set(ops_table.op_backends().values()) == {"portable"}


def test_a_torchvision_without_kernels_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Python half imports, but ``torch.ops.torchvision.nms`` does not exist."""
    fake = types.ModuleType("torchvision")
    fake.ops = types.ModuleType("torchvision.ops")
    monkeypatch.setitem(sys.modules, "torchvision", fake)
    monkeypatch.setitem(sys.modules, "torchvision.ops", fake.ops)
    monkeypatch.setattr(torch.ops, "torchvision", types.SimpleNamespace(), raising=False)
    assert ops_table.torchvision_ops() == {}


def test_offset_and_half_precision_go_to_the_portable_nms(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision knows no offset, and no half precision on the CPU."""
    calls = []

    def fake_nms(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
        calls.append(threshold)
        return ext_signatures.nms(boxes, scores, threshold, 0)

    monkeypatch.setattr(torch.ops, "torchvision", types.SimpleNamespace(nms=fake_nms), raising=False)
    boxes, scores = torch.tensor([[0.0, 0, 1, 1], [1, 0, 2, 1]]), torch.tensor([0.9, 0.8])
    assert ops_table._torchvision_nms(boxes, scores, 0.3, 1).tolist() == [0]
    assert ops_table._torchvision_nms(boxes.half(), scores.half(), 0.3, 0).tolist() == [0, 1]
    assert calls == []
    assert ops_table._torchvision_nms(boxes, scores, 0.3, 0).tolist() == [0, 1]
    assert calls == [0.3]


@pytest.mark.skipif(not ops_table.torchvision_ops(), reason="no torchvision that works with this torch")
def test_torchvision_agrees_with_the_portable_ops() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 9, 9, generator=generator)
    rois = torch.tensor([[0.0, 1, 1, 6, 7], [1.0, 0, 2, 8, 8]])
    none = torch.zeros(0)
    results = []
    for op in (ops_table._torchvision_roi_align_forward, ext_signatures.roi_align_forward):
        out = torch.zeros(2, 4, 3, 3)
        op(x, rois, out, none, none, 3, 3, 1.0, 0, 1, True)
        results.append(out)
    torch.testing.assert_close(*results)
    offset = torch.randn(2, 18, 9, 9, generator=generator)
    weight = torch.randn(5, 4, 3, 3, generator=generator)
    results = []
    for convolve in (ops_table._torchvision_deform_conv2d, ops_table.deform_conv2d):
        layout = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, "deform_groups": 1}
        results.append(convolve(x, offset, None, weight, **layout))
    torch.testing.assert_close(*results)
