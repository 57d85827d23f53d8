"""Tiny heads and segmentors, and batches with real and random labels."""

import copy
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn

import mm_plugins  # noqa: F401

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "configs" / "lau"
IMAGES = ROOT / "tests" / "data" / "nuclei" / "images"
BN = {"type": "BN", "requires_grad": True}
COMMON = {"num_classes": 3, "channels": 8, "norm_cfg": BN, "dropout_ratio": 0.1}
ONE = {"in_channels": 8, "in_index": 0, **COMMON}
FOUR = {"in_channels": [8, 8, 8, 8], "in_index": [0, 1, 2, 3], **COMMON}

# Arguments of every head that is offered by name, small.
HEADS: dict[str, dict[str, Any]] = {
    "ANNHead": {**FOUR, "in_channels": [8, 8], "in_index": [1, 2], "project_channels": 4},
    "APCHead": {**ONE, "pool_scales": (1, 2)},
    "ASPPHead": {**ONE, "dilations": (1, 2)},
    "CCHead": ONE,
    "DMHead": {**ONE, "filter_sizes": (1, 3)},
    "DNLHead": ONE,
    "DPTHead": {
        **ONE,
        "embed_dims": 8,
        "post_process_channels": [8, 8, 8, 8],
        "in_channels": [8, 8, 8, 8],
        "in_index": [0, 1, 2, 3],
        "input_transform": "multiple_select",
    },
    "DepthwiseSeparableASPPHead": {**ONE, "dilations": (1, 2), "c1_in_channels": 0, "c1_channels": 0},
    "DepthwiseSeparableFCNHead": {**ONE, "num_convs": 1, "concat_input": False},
    "EMAHead": {**ONE, "ema_channels": 8, "num_bases": 4, "num_stages": 1, "momentum": 0.1},
    "EncHead": {**FOUR, "in_channels": [8], "in_index": [0], "num_codes": 4},
    "FCNHead": {**ONE, "num_convs": 1},
    "FPNHead": {**FOUR, "feature_strides": [4, 8, 16, 32]},
    "GCHead": {**ONE, "ratio": 0.5},
    "ISAHead": {**ONE, "isa_channels": 4, "down_factor": (2, 2)},
    "LRASPPHead": {
        **FOUR,
        "in_channels": (8, 8, 8),
        "in_index": (0, 1, 2),
        "branch_channels": (4, 4),
        "input_transform": "multiple_select",
    },
    "LightHamHead": {
        **FOUR,
        "ham_channels": 8,
        "ham_kwargs": {"MD_S": 1, "MD_R": 4, "train_steps": 1, "eval_steps": 1},
    },
    "NLHead": ONE,
    "OCRHead": {**ONE, "ocr_channels": 4},
    "PSAHead": {**ONE, "mask_size": (12, 12)},
    "PSPHead": {**ONE, "pool_scales": (1, 2)},
    "SETRMLAHead": {**FOUR, "channels": 32, "mla_channels": 8, "up_scale": 1},
    "SETRUPHead": {**ONE, "norm_cfg": BN, "num_convs": 1, "up_scale": 1},
    "SegformerHead": FOUR,
    "UPerHead": {**FOUR, "pool_scales": (1, 2)},
}


def head(base: str, lau: dict[str, Any] | None = None, **changes: Any) -> nn.Module:
    """A head with LaU, training mode."""
    init_default_scope("mmseg")
    options = copy.deepcopy(HEADS[base]) | changes
    lau = {"scale_factor": 2, "mid_channels": 4, **(lau or {})}
    return MODELS.build({"type": f"LaU{base}", "lau": lau, **options}).train()


def plain_head(base: str, **changes: Any) -> nn.Module:
    """The same head without LaU."""
    init_default_scope("mmseg")
    return MODELS.build({"type": base, **copy.deepcopy(HEADS[base]), **changes}).train()


def features(base: str, side: int = 12) -> list[Any]:
    """Four levels of random features; of one size where the host wants that, with class tokens for DPT."""
    flat = base in ("SETRMLAHead", "ANNHead", "DPTHead", "LRASPPHead")
    # LR-ASPP pools windows of 49 pixels.
    side = 50 if base == "LRASPPHead" else side
    sides = [side] * 4 if flat else [side, side // 2, side // 4, side // 4]
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 8, s, s, generator=generator) for s in sides]
    return [(x, torch.zeros(2, 8)) for x in maps] if base == "DPTHead" else maps


def samples(side: int | tuple[int, int], num_classes: int = 3, ignored: int = 3) -> list[SegDataSample]:
    """Two random label maps; the first rows are ignored."""
    height, width = (side, side) if isinstance(side, int) else side
    labels = torch.randint(num_classes, (2, 1, height, width), generator=torch.Generator().manual_seed(1))
    labels[:, :, :ignored] = 255
    meta = {"img_shape": (height, width), "ori_shape": (height, width), "pad_shape": (height, width)}
    return [SegDataSample(gt_sem_seg=PixelData(data=label), metainfo=meta) for label in labels]


def summed(losses: dict[str, Tensor]) -> Tensor:
    """The host's sum: every entry with "loss" in its name."""
    return sum(value for name, value in losses.items() if "loss" in name)


def config(name: str = "lau_fcn_r18_nuclei", **changes: Any) -> Config:
    """A shipped small config, on the images of tests/data."""
    found = Config.fromfile(CONFIGS / f"{name}.py")
    found.merge_from_dict(changes)
    for loader in (found.train_dataloader, found.val_dataloader, found.test_dataloader):
        loader.dataset.data_root = str(ROOT / loader.dataset.data_root)
    return found


def segmentor(name: str = "lau_fcn_r18_nuclei", **changes: Any) -> nn.Module:
    """Its model, eval mode."""
    init_default_scope("mmseg")
    torch.manual_seed(0)
    model: ConfigDict = config(name, **changes).model
    return MODELS.build(model).eval()
