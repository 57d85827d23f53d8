"""The process group starts without CUDA; the run itself is tested in test_host_tools.py."""

import mmengine.dist.utils as dist_utils
import pytest
import torch

import mm_plugins  # noqa: F401
from mm_plugins.compat.cpu_launch import repair_cpu_launch, require_cpu_backend


def test_gpu_backend_is_refused_with_the_option_to_set() -> None:
    with pytest.raises(RuntimeError, match="needs a GPU.*env_cfg.dist_cfg.backend=gloo"):
        require_cpu_backend("nccl")
    require_cpu_backend("gloo")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the repair is for machines without CUDA")
def test_repair_is_in_place_and_idempotent() -> None:
    before = dist_utils._init_dist_pytorch
    assert before.__wrapped__.__module__ == "mmengine.dist.utils"
    repair_cpu_launch()
    assert dist_utils._init_dist_pytorch is before


def test_repair_leaves_a_gpu_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def original() -> None:
        raise AssertionError("never called")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist_utils, "_init_dist_pytorch", original)
    repair_cpu_launch()
    assert dist_utils._init_dist_pytorch is original
