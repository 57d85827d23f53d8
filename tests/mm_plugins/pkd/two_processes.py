"""What each of two DDP processes does in the test of fact 15; a module of its own, because spawn imports it
afresh."""

import os
from pathlib import Path

import torch
import torch.nn as nn
from mmengine.config import ConfigDict
from torch import Tensor

# Imports mm_plugins, which must come before mmdet.models.
from tests.mm_plugins.pkd import tiny


def student() -> ConfigDict:
    """A student whose norms do not see the batch, so that two halves can equal the whole."""
    model = tiny.retinanet()
    model.backbone.norm_eval = True
    return model


def shared_batch(model: nn.Module) -> tuple[Tensor, list]:
    """Four images, the same in every process."""
    from mmdet.testing import demo_mm_inputs

    data = model.data_preprocessor(demo_mm_inputs(4, [[3, 64, 64]] * 4, num_classes=2), True)
    return data["inputs"], data["data_samples"]


def worker(rank: int, port: int, folder: str, ckpt: str, data: str) -> None:
    """Train one epoch through the Runner, then take one step with synced statistics and write loss and
    gradients."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    import torch.distributed as dist
    from mmdet.registry import MODELS
    from mmengine.model import MMDistributedDataParallel

    runner = tiny.runner(
        tiny.distilled(student(), tiny.retinanet(), ckpt),
        Path(data),
        Path(folder) / "run",
        launcher="pytorch",
        find_unused_parameters=False,
        env_cfg={"dist_cfg": {"backend": "gloo"}},
        train_cfg={"type": "EpochBasedTrainLoop", "max_epochs": 1, "val_interval": 5},
    )
    runner.train()

    torch.manual_seed(0)
    synced = {"loss_weight": 6.0, "sync_stats": True}
    model = MODELS.build(tiny.distilled(student(), tiny.retinanet(), ckpt, loss=synced)).train()
    images, samples = shared_batch(model)
    part = slice(2 * rank, 2 * rank + 2)
    # Held by a name: without its wrapper the reducer is gone before backward.
    wrapped = MMDistributedDataParallel(model, find_unused_parameters=False)
    losses = wrapped(images[part], samples[part], mode="loss")
    total = sum(value for name, value in losses.items() if "loss_pkd" in name)
    # Head losses take part with weight zero, so that DDP sees every parameter.
    idle = [x for name, value in losses.items() if name in ("loss_cls", "loss_bbox") for x in value]
    (total + 0 * sum(idle)).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.save({"loss": total.item(), "grads": grads, "steps": runner.iter}, f"{folder}/rank{rank}.pth")
    dist.destroy_process_group()
