"""Tiny detectors, a dataset of coloured squares, and Runners that train them in a second."""

import copy
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config
from mmengine.runner import Runner
from torch import Tensor

import mm_plugins  # noqa: F401

CLASSES = ("red", "green")
_count = itertools.count()


@functools.cache
def _wheel(name: str) -> ConfigDict:
    return get_config(f"mmdet::{name}").model


def retinanet(*, channels: int = 16, style: str = "pytorch", **changes: Any) -> ConfigDict:
    """RetinaNet with a ResNet-18 of 8 base channels; levels P3..P7."""
    model = copy.deepcopy(_wheel("retinanet/retinanet_r18_fpn_1x_coco.py"))
    model.backbone.update(init_cfg=None, base_channels=8, frozen_stages=-1, norm_eval=False)
    model.neck.update(in_channels=[8, 16, 32, 64], out_channels=channels)
    model.bbox_head.update(num_classes=2, in_channels=channels, feat_channels=8, stacked_convs=1)
    model.bbox_head.anchor_generator.update(octave_base_scale=2)
    # An untrained head is unsure of everything; keep its boxes, so that there are metrics to compare.
    model.test_cfg.update(score_thr=0.0, nms_pre=8, max_per_img=5)
    if style == "caffe":
        model.data_preprocessor.update(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False)
    for name, value in changes.items():
        # ConfigDict.update would merge into what is there.
        model[name] = value
    return model


def faster_rcnn(*, channels: int = 16) -> ConfigDict:
    """Faster R-CNN of the same size; levels P2..P6."""
    model = copy.deepcopy(_wheel("faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"))
    model.backbone.update(depth=18, init_cfg=None, base_channels=8, frozen_stages=-1, norm_eval=False)
    model.neck.update(in_channels=[8, 16, 32, 64], out_channels=channels)
    model.rpn_head.update(in_channels=channels, feat_channels=8)
    model.roi_head.bbox_roi_extractor.update(out_channels=channels)
    model.roi_head.bbox_head.update(in_channels=channels, fc_out_channels=8, num_classes=2)
    return model


def swin_mask_rcnn(*, channels: int = 16) -> ConfigDict:
    """Mask R-CNN on a Swin of 8 dims with drop path 0.2."""
    model = copy.deepcopy(_wheel("swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"))
    model.backbone.update(
        embed_dims=8, depths=[1, 1, 2, 1], num_heads=[1, 1, 2, 2], init_cfg=None, drop_path_rate=0.2
    )
    model.neck.update(in_channels=[8, 16, 32, 64], out_channels=channels)
    return model


def distilled(student: dict, teacher: dict, teacher_ckpt: object = None, /, **options: Any) -> ConfigDict:
    """The student's config with a distill block."""
    student = copy.deepcopy(student)
    kind = student.pop("type")
    ckpt = None if teacher_ckpt is None else str(teacher_ckpt)
    distill = {"teacher": {"model": copy.deepcopy(teacher)}, "teacher_ckpt": ckpt, **options}
    return ConfigDict({"type": "PKDDetector", "student_type": kind, "distill": distill, **student})


def write_weights(path: Path, model: dict, seed: int = 1) -> Path:
    """A checkpoint of randomly initialised weights."""
    from mmdet.registry import MODELS

    torch.manual_seed(seed)
    detector = MODELS.build(copy.deepcopy(model))
    torch.save({"state_dict": detector.state_dict(), "meta": {}}, path)
    return path


def write_dataset(folder: Path, *, num_images: int = 6) -> Path:
    """PNG images of 64 x 48..64 pixels with one coloured square each, and a COCO file."""
    generator = np.random.default_rng(0)
    images, annotations = [], []
    for index in range(num_images):
        height, width = 64, 48 + 8 * (index % 3)
        picture = generator.integers(0, 60, (height, width, 3), dtype=np.uint8)
        x, y, label = int(generator.integers(2, 20)), int(generator.integers(2, 30)), index % 2
        picture[y : y + 24, x : x + 20] = (30, 30, 220) if label == 0 else (30, 220, 30)
        cv2.imwrite(str(folder / f"{index}.png"), picture)
        images.append({"id": index, "file_name": f"{index}.png", "width": width, "height": height})
        box = {"bbox": [x, y, 20, 24], "area": 480, "iscrowd": 0}
        annotations.append({"id": index + 1, "image_id": index, "category_id": label + 1, **box})
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "coco.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def config(model: dict, data: Path, work_dir: Path, **changes: Any) -> Config:
    """Two epochs on the dataset, batch 2, no randomness besides the seed."""
    keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
    load = [
        {"type": "LoadImageFromFile"},
        {"type": "Resize", "scale": (64, 64), "keep_ratio": True},
        {"type": "LoadAnnotations", "with_bbox": True},
        {"type": "PackDetInputs", "meta_keys": keys},
    ]
    dataset = {
        "type": "CocoDataset",
        "data_root": f"{data}/",
        "ann_file": "coco.json",
        "data_prefix": {"img": ""},
        "metainfo": {"classes": CLASSES},
        "pipeline": load,
    }
    loader = {"batch_size": 2, "num_workers": 0, "persistent_workers": False}
    test = {
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "dataset": {**dataset, "test_mode": True},
    }
    metric = {"type": "CocoMetric", "ann_file": f"{data}/coco.json", "metric": "bbox"}
    content = {
        "default_scope": "mmdet",
        "custom_imports": {"imports": ["mm_plugins"], "allow_failed_imports": False},
        "model": model,
        "train_dataloader": {
            **loader,
            "sampler": {"type": "DefaultSampler", "shuffle": True},
            "dataset": dataset,
        },
        "val_dataloader": {**loader, **test},
        "test_dataloader": {**loader, **test},
        "val_evaluator": metric,
        "test_evaluator": metric,
        "train_cfg": {"type": "EpochBasedTrainLoop", "max_epochs": 2, "val_interval": 1},
        "val_cfg": {"type": "ValLoop"},
        "test_cfg": {"type": "TestLoop"},
        "optim_wrapper": {
            "type": "OptimWrapper",
            "optimizer": {"type": "SGD", "lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4},
        },
        "default_hooks": {
            "logger": {"type": "LoggerHook", "interval": 1},
            "checkpoint": {"type": "CheckpointHook", "interval": 1},
        },
        "env_cfg": {"mp_cfg": {"mp_start_method": "fork", "opencv_num_threads": 1}},
        "randomness": {"seed": 0},
        "work_dir": str(work_dir),
        "log_level": "ERROR",
        # mmengine keeps one message hub per name and names runs by the second.
        "experiment_name": f"pkd_test_{next(_count)}",
    }
    return Config({**content, **changes})


def runner(*args: Any, **changes: Any) -> Runner:
    """A Runner of `config`."""
    return Runner.from_cfg(config(*args, **changes))


def equal_states(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two state dicts have the same names and bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
