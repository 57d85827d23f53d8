"""Let ``--launcher pytorch`` work where PyTorch has no CUDA.

mmengine 0.10.7 calls ``torch.cuda.set_device`` before it starts the process group, and hands DDP a device id
that a model on the CPU must not have. Both are repaired on a machine without CUDA only; everything else
(samplers, gradient averaging, metrics) is mmengine's own.
"""

import functools
from collections.abc import Callable
from typing import Any

import mmengine.dist.utils as dist_utils
import mmengine.runner.runner as runner_module
import torch
import torch.distributed
from mmengine.model import MMDistributedDataParallel


def require_cpu_backend(backend: str) -> None:
    """Refuse a backend that needs a GPU, before the processes wait for one another.

    Raises:
        RuntimeError: If the backend is not ``gloo`` or ``mpi``.
    """
    if backend not in ("gloo", "mpi"):
        raise RuntimeError(
            f"env_cfg.dist_cfg.backend is {backend!r}, which needs a GPU, and PyTorch sees none here. "
            "For processes on CPU add: --cfg-options env_cfg.dist_cfg.backend=gloo"
        )


class CPUDistributedDataParallel(MMDistributedDataParallel):
    """mmengine's DDP for a model on the CPU: takes the same arguments and drops the ids of GPUs."""

    def __init__(
        self, module: torch.nn.Module, *, device_ids: list[int] | None = None, **kwargs: Any
    ) -> None:
        del device_ids  # PyTorch refuses any id for a module on the CPU.
        super().__init__(module=module, **kwargs)


def repair_cpu_launch() -> None:
    """Replace mmengine's start of the process group and its DDP on a machine without CUDA; idempotent."""
    original: Callable[..., None] = dist_utils._init_dist_pytorch
    if torch.cuda.is_available() or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def start(backend: str, init_backend: str = "torch", **kwargs: Any) -> None:
        if init_backend != "torch" or dist_utils.is_npu_available() or dist_utils.is_mlu_available():
            original(backend, init_backend=init_backend, **kwargs)
            return
        require_cpu_backend(backend)
        torch.distributed.init_process_group(backend=backend, **kwargs)

    dist_utils._init_dist_pytorch = start
    runner_module.MMDistributedDataParallel = CPUDistributedDataParallel
