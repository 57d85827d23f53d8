"""Small models, and the real annotated images that tests read."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.registry import DATASETS, MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData, PixelData
from torch import nn

from tests.real_data import real_data

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "configs" / "spatialflow"
NUCLEI = ROOT / "tests" / "data" / "nuclei"


def model_config(name: str = "_base_/small", **changes: Any) -> ConfigDict:
    """The model of a shipped config; `changes` as in ``--cfg-options``, with `__` for dots."""
    config = Config.fromfile(CONFIGS / f"{name}.py")
    config.merge_from_dict({f"model.{key.replace('__', '.')}": value for key, value in changes.items()})
    config.model.backbone.init_cfg = None
    return config.model


def detector(name: str = "_base_/small", seed: int = 0, **changes: Any) -> nn.Module:
    """A model with fresh weights."""
    init_default_scope("mmdet")
    torch.manual_seed(seed)
    model = MODELS.build(model_config(name, **changes))
    model.init_weights()
    return model


def head_config(channels: int = 16, **changes: Any) -> dict[str, Any]:
    """Arguments of a small SpatialFlowHead with 3 classes."""
    config = {
        "type": "SpatialFlowHead",
        "num_classes": 3,
        "in_channels": channels,
        "feat_channels": channels,
        "anchor_generator": dict(
            type="AnchorGenerator",
            octave_base_scale=4,
            scales_per_octave=3,
            ratios=[0.5, 1.0, 2.0],
            strides=[8, 16, 32, 64, 128],
        ),
        "bbox_coder": dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[1.0] * 4),
        "loss_cls": dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        "loss_bbox": dict(type="L1Loss", loss_weight=1.0),
    }
    return copy.deepcopy(config | changes)


def head(seed: int = 0, std: float = 0.1, **changes: Any) -> nn.Module:
    """A small SpatialFlowHead whose weights and biases are large enough to matter."""
    init_default_scope("mmdet")
    torch.manual_seed(seed)
    built = MODELS.build(head_config(**changes))
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=std)
    return built


def pyramid(channels: int = 16, side: int = 16, batch: int = 2) -> list[torch.Tensor]:
    """Random features of five levels."""
    generator = torch.Generator().manual_seed(0)
    sides = [max(side >> level, 1) for level in range(5)]
    return [torch.randn(batch, channels, s, s, generator=generator) for s in sides]


def nuclei_dataset(**changes: Any) -> Any:
    """The committed training images."""
    init_default_scope("mmdet")
    config = Config.fromfile(CONFIGS / "spatialflow_r18_nuclei.py")
    dataset = config.train_dataloader.dataset
    dataset.data_root = str(NUCLEI)
    dataset.update(changes)
    return DATASETS.build(dataset)


def coco_sample(scale: tuple[int, int] | None = None, kind: str = "PanopticDataset") -> Any:
    """panopticapi's two COCO images with all 133 categories; a skip where the folder is absent."""
    init_default_scope("mmdet")
    folder = real_data("panopticapi_sample")
    resize = [dict(type="Resize", scale=scale, keep_ratio=True)] if scale else []
    pipeline = [
        dict(type="LoadImageFromFile"),
        dict(type="LoadPanopticAnnotations"),
        *resize,
        dict(type="PackDetInputs"),
    ]
    return DATASETS.build(
        dict(
            type=kind,
            data_root=str(folder),
            ann_file="panoptic_examples.json",
            data_prefix=dict(img="input_images/", seg="panoptic_examples/"),
            pipeline=pipeline,
        )
    )


def batch(dataset: Any, indices: range | list[int] = range(2)) -> dict[str, list]:
    """Images of a data set in the form that a data preprocessor takes."""
    items = [dataset[i] for i in indices]
    return {key: [item[key] for item in items] for key in ("inputs", "data_samples")}


def synthetic_batch(
    sizes: list[tuple[int, int]], num_things: int = 3, num_stuff: int = 2, empty: bool = False
) -> dict[str, list]:
    """Images with two square objects each, upper half stuff 0, lower half stuff 1."""
    rng = np.random.default_rng(0)
    inputs, samples = [], []
    for height, width in sizes:
        masks = np.zeros((2, height, width), bool)
        masks[0, 4:28, 4:28], masks[1, 20:52, 30:60] = True, True
        labels = torch.tensor([0, num_things - 1])
        semantic = np.full((height, width), num_things, np.uint8)
        semantic[height // 2 :] = num_things + num_stuff - 1
        if empty:
            masks, labels = masks[:0], labels[:0]
        for mask, label in zip(masks, labels.tolist(), strict=True):
            semantic[mask] = label
        boxes = torch.tensor([[4.0, 4, 28, 28], [30, 20, 60, 52]])[: len(masks)]
        sample = DetDataSample(
            metainfo=dict(
                img_shape=(height, width),
                ori_shape=(height, width),
                scale_factor=(1.0, 1.0),
                img_id=len(samples),
            )
        )
        from mmdet.structures.mask import BitmapMasks

        sample.gt_instances = InstanceData(
            bboxes=boxes, labels=labels, masks=BitmapMasks(masks.astype(np.uint8), height, width)
        )
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0).long())
        sample.gt_sem_seg = PixelData(sem_seg=torch.from_numpy(semantic)[None])
        inputs.append(torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8)))
        samples.append(sample)
    return {"inputs": inputs, "data_samples": samples}


SMALL_CLASSES = {
    "bbox_head__num_classes": 3,
    "roi_head__mask_head__num_classes": 3,
    "semantic_head__num_things_classes": 3,
    "semantic_head__num_stuff_classes": 2,
    "panoptic_fusion_head__num_things_classes": 3,
    "panoptic_fusion_head__num_stuff_classes": 2,
}
"""Options that give a model 3 thing and 2 stuff classes, those of `synthetic_batch`."""
