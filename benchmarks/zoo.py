"""Does the zoo run? Build, train one step and predict with every model family of mmdet 3.3 and mmseg 1.2.

The configs are those inside the two wheels. They are used as they are, except that images, proposals and
queries are few and no weights are fetched; ``docs/zoo.md`` lists the changes. Each config runs in a process
of its own and leaves one JSON file, so that an interrupted run goes on where it stopped.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import importlib
import io
import json
import logging
import math
import multiprocessing
import re
import resource
import sys
import time
import traceback
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapper
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn

import mm_plugins
from benchmarks.record import write_result

ROOT = Path(__file__).resolve().parent.parent
WORK_DIR = ROOT / "work_dirs" / "zoo"
HOSTS = ("mmdet", "mmseg")
SEED = 0
MEMORY_LIMIT = 14 * 2**30
"""Address space of one run, in bytes; a model that asks for more fails alone."""

NO_MODEL = "settings for other folders, no model of its own"
SAME_MODEL = "the folder is about a data pipeline; its model is that of {}"
SKIPPED: dict[str, dict[str, str]] = {
    "mmdet": {
        "_base_": NO_MODEL,
        "common": NO_MODEL,
        "dsdl": SAME_MODEL.format("faster_rcnn and mask_rcnn"),
        "albu_example": SAME_MODEL.format("mask_rcnn"),
        "instaboost": SAME_MODEL.format("cascade_rcnn and mask_rcnn"),
    },
    "mmseg": {
        "_base_": NO_MODEL,
        "dsdl": SAME_MODEL.format("pspnet"),
    },
}
"""Config folders that are not run, with the reason."""

CASES: dict[str, dict[str, tuple[str, ...]]] = {
    "mmdet": {
        "atss": ("atss_r50_fpn_1x_coco",),
        "autoassign": ("autoassign_r50-caffe_fpn_1x_coco",),
        "boxinst": ("boxinst_r50_fpn_ms-90k_coco",),
        "bytetrack": ("bytetrack_yolox_x_8xb4-80e_crowdhuman-mot17halftrain_test-mot17halfval",),
        "carafe": ("faster-rcnn_r50_fpn-carafe_1x_coco", "mask-rcnn_r50_fpn-carafe_1x_coco"),
        "cascade_rcnn": (
            "cascade-rcnn_r18_fpn_8xb8-amp-lsj-200e_coco",
            "cascade-mask-rcnn_r50_fpn_1x_coco",
        ),
        "cascade_rpn": ("cascade-rpn_r50-caffe_fpn_1x_coco", "cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco"),
        "centernet": (
            "centernet_r18-dcnv2_8xb16-crop512-140e_coco",
            "centernet-update_r18_fpn_8xb8-amp-lsj-200e_coco",
        ),
        "centripetalnet": ("centripetalnet_hourglass104_16xb6-crop511-210e-mstest_coco",),
        "cityscapes": ("mask-rcnn_r50_fpn_1x_cityscapes",),
        "condinst": ("condinst_r50_fpn_ms-poly-90k_coco_instance",),
        "conditional_detr": ("conditional-detr_r50_8xb2-50e_coco",),
        "convnext": ("mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco",),
        "cornernet": ("cornernet_hourglass104_8xb6-210e-mstest_coco",),
        "crowddet": (
            "crowddet-rcnn_r50_fpn_8xb2-30e_crowdhuman",
            "crowddet-rcnn_refine_r50_fpn_8xb2-30e_crowdhuman",
        ),
        "dab_detr": ("dab-detr_r50_8xb2-50e_coco",),
        "dcn": ("mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco", "faster-rcnn_r50_fpn_dpool_1x_coco"),
        "dcnv2": ("mask-rcnn_r50-mdconv-c3-c5_fpn_1x_coco", "faster-rcnn_r50_fpn_mdpool_1x_coco"),
        "ddod": ("ddod_r50_fpn_1x_coco",),
        "ddq": ("ddq-detr-4scale_r50_8xb2-12e_coco",),
        "deepfashion": ("mask-rcnn_r50_fpn_15e_deepfashion",),
        "deepsort": ("deepsort_faster-rcnn_r50_fpn_8xb2-4e_mot17halftrain_test-mot17halfval",),
        "deformable_detr": (
            "deformable-detr_r50_16xb2-50e_coco",
            "deformable-detr-refine-twostage_r50_16xb2-50e_coco",
        ),
        "detectors": ("detectors_cascade-rcnn_r50_1x_coco", "detectors_htc-r50_1x_coco"),
        "detr": ("detr_r18_8xb2-500e_coco",),
        "dino": ("dino-4scale_r50_8xb2-12e_coco",),
        "double_heads": ("dh-faster-rcnn_r50_fpn_1x_coco",),
        "dyhead": ("atss_r50_fpn_dyhead_1x_coco",),
        "dynamic_rcnn": ("dynamic-rcnn_r50_fpn_1x_coco",),
        "efficientnet": ("retinanet_effb3_fpn_8xb4-crop896-1x_coco",),
        "empirical_attention": (
            "faster-rcnn_r50-attn1111_fpn_1x_coco",
            "faster-rcnn_r50-attn0010-dcn_fpn_1x_coco",
        ),
        "fast_rcnn": ("fast-rcnn_r50_fpn_1x_coco",),
        "faster_rcnn": ("faster-rcnn_r50_fpn_soft-nms_1x_coco", "faster-rcnn_r50-caffe_c4-1x_coco"),
        "fcos": (
            "fcos_r50-caffe_fpn_gn-head_1x_coco",
            "fcos_r50-dcn-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco",
        ),
        "foveabox": ("fovea_r50_fpn_4xb4-1x_coco", "fovea_r50_fpn_gn-head-align_4xb4-2x_coco"),
        "fpg": ("retinanet_r50_fpg-chn128_crop640_50e_coco", "mask-rcnn_r50_fpg-chn128_crop640-50e_coco"),
        "free_anchor": ("freeanchor_r50_fpn_1x_coco",),
        "fsaf": ("fsaf_r50_fpn_1x_coco",),
        "gcnet": ("mask-rcnn_r50-gcb-r4-c3-c5_fpn_1x_coco", "mask-rcnn_r50-syncbn_fpn_1x_coco"),
        "gfl": ("gfl_r50_fpn_1x_coco", "gfl_r101-dconv-c3-c5_fpn_ms-2x_coco"),
        "ghm": ("retinanet_r50_fpn_ghm-1x_coco",),
        "glip": ("glip_atss_swin-t_a_fpn_dyhead_pretrain_obj365",),
        "gn": ("mask-rcnn_r50_fpn_gn-all_2x_coco",),
        "gn+ws": ("faster-rcnn_r50_fpn_gn-ws-all_1x_coco",),
        "grid_rcnn": ("grid-rcnn_r50_fpn_gn-head_1x_coco",),
        "groie": ("mask-rcnn_r50_fpn_groie_1x_coco", "grid-rcnn_r50_fpn_gn-head-groie_1x_coco"),
        "grounding_dino": ("grounding_dino_r50_scratch_8xb2_1x_coco",),
        "guided_anchoring": ("ga-retinanet_r50-caffe_fpn_1x_coco", "ga-faster-rcnn_r50_fpn_1x_coco"),
        "hrnet": ("faster-rcnn_hrnetv2p-w18-1x_coco",),
        "htc": ("htc-without-semantic_r50_fpn_1x_coco", "htc_r50_fpn_1x_coco"),
        "lad": ("lad_r50-paa-r101_fpn_2xb8_coco_1x",),
        "ld": ("ld_r18-gflv1-r101_fpn_1x_coco",),
        "legacy_1.x": ("mask-rcnn_r50_fpn_1x_coco_v1", "ssd300_coco_v1"),
        "libra_rcnn": ("libra-faster-rcnn_r50_fpn_1x_coco", "libra-retinanet_r50_fpn_1x_coco"),
        "lvis": ("mask-rcnn_r50_fpn_sample1e-3_ms-1x_lvis-v1",),
        "mask2former": ("mask2former_r50_8xb2-lsj-50e_coco", "mask2former_r50_8xb2-lsj-50e_coco-panoptic"),
        "mask2former_vis": ("mask2former_r50_8xb2-8e_youtubevis2019",),
        "mask_rcnn": ("mask-rcnn_r50_fpn_1x_coco", "mask-rcnn_r50-caffe-c4_1x_coco"),
        "maskformer": ("maskformer_r50_ms-16xb1-75e_coco",),
        "masktrack_rcnn": ("masktrack-rcnn_mask-rcnn_r50_fpn_8xb1-12e_youtubevis2019",),
        "misc": ("d2_retinanet_r50-caffe_fpn_ms-90k_coco",),
        "mm_grounding_dino": ("grounding_dino_swin-t_pretrain_obj365",),
        "ms_rcnn": ("ms-rcnn_r50_fpn_1x_coco",),
        "nas_fcos": (
            "nas-fcos_r50-caffe_fpn_fcoshead-gn-head_4xb4-1x_coco",
            "nas-fcos_r50-caffe_fpn_nashead-gn-head_4xb4-1x_coco",
        ),
        "nas_fpn": ("retinanet_r50_nasfpn_crop640-50e_coco",),
        "objects365": ("retinanet_r50_fpn_1x_objects365v1",),
        "ocsort": ("ocsort_yolox_x_8xb4-amp-80e_crowdhuman-mot17halftrain_test-mot17halfval",),
        "openimages": ("faster-rcnn_r50_fpn_32xb2-1x_openimages", "ssd300_32xb8-36e_openimages"),
        "paa": ("paa_r50_fpn_1x_coco",),
        "pafpn": ("faster-rcnn_r50_pafpn_1x_coco",),
        "panoptic_fpn": ("panoptic-fpn_r50_fpn_1x_coco",),
        "pascal_voc": ("retinanet_r50_fpn_1x_voc0712",),
        "pisa": ("mask-rcnn_r50_fpn_pisa_1x_coco", "retinanet-r50_fpn_pisa_1x_coco"),
        "point_rend": ("point-rend_r50-caffe_fpn_ms-1x_coco",),
        "pvt": ("retinanet_pvt-t_fpn_1x_coco", "retinanet_pvtv2-b0_fpn_1x_coco"),
        "qdtrack": ("qdtrack_faster-rcnn_r50_fpn_8xb2-4e_mot17halftrain_test-mot17halfval",),
        "queryinst": ("queryinst_r50_fpn_1x_coco",),
        "regnet": ("retinanet_regnetx-800MF_fpn_1x_coco", "mask-rcnn_regnetx-3.2GF-mdconv-c3-c5_fpn_1x_coco"),
        "reid": ("reid_r50_8xb32-6e_mot17train80_test-mot17val20",),
        "reppoints": (
            "reppoints-moment_r50_fpn-gn_head-gn_1x_coco",
            "reppoints-bbox_r50_fpn-gn_head-gn-grid_1x_coco",
        ),
        "res2net": ("faster-rcnn_res2net-101_fpn_2x_coco",),
        "resnest": ("faster-rcnn_s50_fpn_syncbn-backbone+head_ms-range-1x_coco",),
        "resnet_strikes_back": ("retinanet_r50-rsb-pre_fpn_1x_coco",),
        "retinanet": ("retinanet_r18_fpn_1x_coco", "retinanet_r50_fpn_1x_coco"),
        "rpn": ("rpn_r50_fpn_1x_coco", "rpn_r50-caffe-c4_1x_coco"),
        "rtmdet": ("rtmdet_tiny_8xb32-300e_coco", "rtmdet-ins_tiny_8xb32-300e_coco"),
        "sabl": ("sabl-retinanet_r50_fpn_1x_coco", "sabl-cascade-rcnn_r50_fpn_1x_coco"),
        "scnet": ("scnet_r50_fpn_1x_coco",),
        "scratch": ("faster-rcnn_r50-scratch_fpn_gn-all_6x_coco",),
        "seesaw_loss": ("mask-rcnn_r50_fpn_seesaw-loss-normed-mask_random-ms-2x_lvis-v1",),
        "selfsup_pretrain": ("mask-rcnn_r50-mocov2-pre_fpn_1x_coco",),
        "simple_copy_paste": ("mask-rcnn_r50_fpn_rpn-2conv_4conv1fc_syncbn-all_32xb2-ssj-scp-90k_coco",),
        "soft_teacher": ("soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco",),
        "solo": ("solo_r50_fpn_1x_coco", "decoupled-solo-light_r50_fpn_3x_coco"),
        "solov2": ("solov2-light_r18_fpn_ms-3x_coco", "solov2-light_r50-dcn_fpn_ms-3x_coco"),
        "sort": (
            "sort_faster-rcnn_r50_fpn_8xb2-4e_mot17halftrain_test-mot17halfval",
            "faster-rcnn_r50_fpn_8xb2-4e_mot17halftrain_test-mot17halfval",
        ),
        "sparse_rcnn": ("sparse-rcnn_r50_fpn_1x_coco",),
        "ssd": ("ssd300_coco", "ssdlite_mobilenetv2-scratch_8xb24-600e_coco"),
        "strong_baselines": ("mask-rcnn_r50_fpn_rpn-2conv_4conv1fc_syncbn-all_lsj-50e_coco",),
        "strongsort": (
            "strongsort_yolox_x_8xb4-80e_crowdhuman-mot17halftrain_test-mot17halfval",
            "yolox_x_8xb4-80e_crowdhuman-mot17halftrain_test-mot17halfval",
        ),
        "swin": ("retinanet_swin-t-p4-w7_fpn_1x_coco", "mask-rcnn_swin-t-p4-w7_fpn_1x_coco"),
        "timm_example": ("retinanet_timm-tv-resnet50_fpn_1x_coco",),
        "tood": ("tood_r50_fpn_1x_coco", "tood_r101-dconv-c3-c5_fpn_ms-2x_coco"),
        "tridentnet": ("tridentnet_r50-caffe_1x_coco",),
        "v3det": ("faster_rcnn_r50_fpn_8x4_sample1e-3_mstrain_v3det_2x",),
        "vfnet": ("vfnet_r50_fpn_1x_coco", "vfnet_r50-mdconv-c3-c5_fpn_ms-2x_coco"),
        "wider_face": ("retinanet_r50_fpn_1x_widerface",),
        "yolact": ("yolact_r50_1xb8-55e_coco",),
        "yolo": ("yolov3_mobilenetv2_8xb24-320-300e_coco", "yolov3_d53_8xb8-320-273e_coco"),
        "yolof": ("yolof_r50-c5_8xb8-1x_coco",),
        "yolox": ("yolox_nano_8xb8-300e_coco", "yolox_tiny_8xb8-300e_coco"),
    },
    "mmseg": {
        "ann": ("ann_r50-d8_4xb4-80k_ade20k-512x512",),
        "apcnet": ("apcnet_r50-d8_4xb4-80k_ade20k-512x512",),
        "beit": ("beit-base_upernet_8xb2-160k_ade20k-640x640",),
        "bisenetv1": ("bisenetv1_r18-d32_4xb4-160k_cityscapes-1024x1024",),
        "bisenetv2": (
            "bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024",
            "bisenetv2_fcn_4xb4-ohem-160k_cityscapes-1024x1024",
        ),
        "ccnet": ("ccnet_r50-d8_4xb4-80k_ade20k-512x512",),
        "cgnet": ("cgnet_fcn_4xb4-60k_cityscapes-680x680",),
        "convnext": ("convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512",),
        "danet": ("danet_r50-d8_4xb4-80k_ade20k-512x512",),
        "ddrnet": ("ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024",),
        "deeplabv3": ("deeplabv3_r50-d8_4xb4-80k_ade20k-512x512",),
        "deeplabv3plus": ("deeplabv3plus_r50-d8_4xb4-80k_ade20k-512x512",),
        "dmnet": ("dmnet_r50-d8_4xb4-80k_ade20k-512x512",),
        "dnlnet": ("dnl_r50-d8_4xb4-80k_ade20k-512x512",),
        "dpt": ("dpt_vit-b16_8xb2-160k_ade20k-512x512",),
        "emanet": ("emanet_r50-d8_4xb2-80k_cityscapes-512x1024",),
        "encnet": ("encnet_r50-d8_4xb4-80k_ade20k-512x512",),
        "erfnet": ("erfnet_fcn_4xb4-160k_cityscapes-512x1024",),
        "fastfcn": (
            "fastfcn_r50-d32_jpu_aspp_4xb4-80k_ade20k-512x512",
            "fastfcn_r50-d32_jpu_enc_4xb4-80k_ade20k-512x512",
        ),
        "fastscnn": ("fast_scnn_8xb4-160k_cityscapes-512x1024",),
        "fcn": ("fcn_r50-d8_4xb4-80k_ade20k-512x512", "fcn-d6_r50-d16_4xb2-40k_cityscapes-512x1024"),
        "gcnet": ("gcnet_r50-d8_4xb4-80k_ade20k-512x512",),
        "hrnet": ("fcn_hr18_4xb4-80k_ade20k-512x512",),
        "icnet": ("icnet_r18-d8_4xb2-80k_cityscapes-832x832",),
        "isanet": ("isanet_r50-d8_4xb4-80k_ade20k-512x512",),
        "knet": (
            "knet-s3_r50-d8_fcn_8xb2-adamw-80k_ade20k-512x512",
            "knet-s3_swin-t_upernet_8xb2-adamw-80k_ade20k-512x512",
        ),
        "mae": ("mae-base_upernet_8xb2-amp-160k_ade20k-512x512",),
        "mask2former": ("mask2former_r50_8xb2-160k_ade20k-512x512",),
        "maskformer": ("maskformer_r50-d32_8xb2-160k_ade20k-512x512",),
        "mobilenet_v2": ("mobilenet-v2-d8_fcn_4xb4-160k_ade20k-512x512",),
        "mobilenet_v3": ("mobilenet-v3-d8-scratch-s_lraspp_4xb4-320k_cityscapes-512x1024",),
        "nonlocal_net": ("nonlocal_r50-d8_4xb4-80k_ade20k-512x512",),
        "ocrnet": ("ocrnet_hr18s_4xb4-80k_ade20k-512x512",),
        "pidnet": ("pidnet-s_2xb6-120k_1024x1024-cityscapes",),
        "point_rend": ("pointrend_r50_4xb4-160k_ade20k-512x512",),
        "poolformer": ("fpn_poolformer_s12_8xb4-40k_ade20k-512x512",),
        "psanet": ("psanet_r50-d8_4xb4-80k_ade20k-512x512",),
        "pspnet": ("pspnet_r18-d8_4xb2-80k_cityscapes-512x1024", "pspnet_r50-d8_4xb4-80k_ade20k-512x512"),
        "resnest": ("resnest_s101-d8_fcn_4xb4-160k_ade20k-512x512",),
        "san": ("san-vit-b16_coco-stuff164k-640x640",),
        "segformer": ("segformer_mit-b0_8xb2-160k_ade20k-512x512",),
        "segmenter": (
            "segmenter_vit-t_mask_8xb1-160k_ade20k-512x512",
            "segmenter_vit-s_fcn_8xb1-160k_ade20k-512x512",
        ),
        "segnext": ("segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512",),
        "sem_fpn": ("fpn_r50_4xb4-160k_ade20k-512x512",),
        "setr": ("setr_vit-l_naive_8xb2-160k_ade20k-512x512", "setr_vit-l_mla_8xb2-160k_ade20k-512x512"),
        "stdc": ("stdc1_4xb12-80k_cityscapes-512x1024",),
        "swin": (
            "swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512",
            "swin-tiny-patch4-window7_upernet_1xb8-20k_levir-256x256",
        ),
        "twins": (
            "twins_pcpvt-s_fpn_fpnhead_8xb4-80k_ade20k-512x512",
            "twins_svt-s_uperhead_8xb2-160k_ade20k-512x512",
        ),
        "unet": (
            "unet-s5-d16_fcn_4xb4-40k_drive-64x64",
            "unet-s5-d16_deeplabv3_4xb4-ce-1.0-dice-3.0-40k_drive-64x64",
        ),
        "upernet": ("upernet_r18_4xb4-80k_ade20k-512x512",),
        "vit": (
            "vit_deit-s16_upernet_8xb2-80k_ade20k-512x512",
            "vit_vit-b16-ln_mln_upernet_8xb2-160k_ade20k-512x512",
        ),
        "vpd": ("vpd_sd_4xb8-25k_nyu-480x480",),
    },
}
"""Configs that stand for each family: a small one, and a second where there are two kinds of model."""

IMAGE_SIZE: dict[str, int] = {"mmdet": 128, "mmseg": 64}
LARGER_IMAGES: dict[str, int] = {
    "ssd300_coco": 300,
    "ssd300_coco_v1": 300,
    "ssd300_32xb8-36e_openimages": 300,
    "mobilenet-v3-d8-scratch-s_lraspp_4xb4-320k_cityscapes-512x1024": 512,
}
"""Image sides by host, and by config where the model needs more."""
NEEDS_PRETRAINED = ("san-vit-b16_coco-stuff164k-640x640", "tridentnet_r50-caffe_1x_coco")
"""Models that only pretrained weights initialise (mmdet's TridentConv is uninitialised memory without them);
`initialise` does it for them."""

FEW = {
    "num_queries": 20,
    "num_query": 20,
    "sos_token_num": 20,
    "num_proposals": 20,
    "nms_pre": 100,
    "max_per_img": 20,
}
"""Counts that are lowered to these values wherever a model config holds a larger one."""

PRETRAINED_KEYS = ("pretrained", "teacher_ckpt", "checkpoint", "class_embed_path")
SYNC_NORMS = ("SyncBN", "MMSyncBN", "SyncBatchNorm")
MANY_CLASSES = 2000
"""With more classes than this, score thresholds stay: at zero, every pair of box and class would be kept."""


class DownloadRefused(RuntimeError):
    """A config asks for a file from the network, which a run of the zoo never fetches."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One config of one family."""

    host: str
    family: str
    config: str

    @property
    def name(self) -> str:
        """``host/family/config``, as ``--only`` matches it."""
        return f"{self.host}/{self.family}/{self.config}"

    @property
    def record(self) -> Path:
        """Where the outcome is kept."""
        return WORK_DIR / self.host / self.family / f"{self.config}.json"


@dataclasses.dataclass
class Outcome:
    """What became of one config: how far it came, why not further, and what it used.

    ``trained`` is None where the host defines no training for this model.
    """

    built: bool = False
    trained: bool | None = False
    predicted: bool = False
    verdict: str = "works"
    reason: str = ""
    where: str = ""
    params: int = 0
    loss: float = math.nan
    gradients: str = ""
    result: str = ""
    ops: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0


def cases(only: str | None = None) -> list[Case]:
    """Every config of the table, or those whose name contains ``only``.

    Raises:
        ValueError: If nothing matches.
    """
    found = [
        Case(host, family, config)
        for host in HOSTS
        for family, configs in CASES[host].items()
        for config in configs
    ]
    if only is not None:
        found = [case for case in found if only in case.name]
    if not found:
        raise ValueError(
            f"--only {only!r} matches no config; names look like 'mmdet/atss/atss_r50_fpn_1x_coco'."
        )
    return found


def config_root(host: str) -> Path:
    """The folder of a host's configs, inside its wheel."""
    return Path(importlib.import_module(host).__file__).parent / ".mim" / "configs"


def image_size(case: Case) -> int:
    """Side of the square images of a case."""
    return LARGER_IMAGES.get(case.config, IMAGE_SIZE[case.host])


def walk(node: Any) -> Iterator[dict]:
    """Every dict of a config, the outer ones first."""
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    if isinstance(node, list | tuple):
        for child in node:
            yield from walk(child)


def num_classes_of(model: dict) -> int:
    """The smallest number of classes any head has; labels below it suit all of them."""
    counts = [
        node[key]
        for node in walk(model)
        for key in ("num_classes", "num_things_classes")
        if isinstance(node.get(key), int)
    ]
    return min(counts, default=1)


def _is_pretrained(init_cfg: Any) -> bool:
    # PVT's configs give a checkpoint without a type.
    return isinstance(init_cfg, dict) and "checkpoint" in init_cfg


def shrink(model: ConfigDict, size: int) -> ConfigDict:
    """The same model without downloads, with few queries and proposals, for small images; in place."""
    few_classes = num_classes_of(model) <= MANY_CLASSES
    for node in list(walk(model)):
        if _is_pretrained(node.get("init_cfg")):
            node["init_cfg"] = None
        if isinstance(node.get("init_cfg"), list):
            node["init_cfg"] = [init for init in node["init_cfg"] if not _is_pretrained(init)]
        for key in PRETRAINED_KEYS:
            if isinstance(node.get(key), str):
                node[key] = None
        if node.get("type") in SYNC_NORMS:
            node["type"] = "BN"
        for key, most in FEW.items():
            if isinstance(node.get(key), int):
                node[key] = min(node[key], most)
        for key in ("score_thr", "filter_thr"):
            if few_classes and isinstance(node.get(key), float):
                node[key] = 0.0
        if isinstance(node.get("num_cp"), int):
            node["num_cp"] = 0  # activation checkpointing, which needs fairscale and changes no result
        if node.get("type") == "CLIPTextEncoder":
            # It reads 14 sentences a class.
            node["num_layers"] = 1
        if "img_size" in node:
            node["img_size"] = (size, size)
        if node.get("type") == "BatchFixedSizePad":
            node["size"] = (size, size)
        if node.get("type") == "BatchResize":
            node["scale"] = (size, size)
        if node.get("type") == "BatchSyncRandomResize":
            node["random_size_range"] = (size, size)
    return model


def load_model_config(case: Case) -> tuple[ConfigDict, Config]:
    """The shrunk model section of a case, and its whole config."""
    root = config_root(case.host)
    config = Config.fromfile(root / case.family / f"{case.config}.py")
    size = image_size(case)
    model = shrink(config.model, size)
    if isinstance(model.get("teacher_config"), str):
        # Written relative to mmdet's repository root.
        teacher = Config.fromfile(root.parent / model.teacher_config)
        model.teacher_config = ConfigDict(model=shrink(teacher.model, size))
    if case.host == "mmseg":
        model.data_preprocessor.size = (size, size)
        model.data_preprocessor.pop("size_divisor", None)
        model.test_cfg.mode = "whole"
    return model, config


def _reads(config: Config, flag: str) -> bool:
    """Whether the training pipeline loads masks (``with_mask``) or semantic maps (``with_seg``)."""
    nodes = list(walk(config.get("train_dataloader") or {}))
    return any(node.get(flag) or node.get("type") == "LoadPanopticAnnotations" for node in nodes)


def _detection_batch(model: dict, config: Config, size: int, num_images: int = 2) -> dict:
    """Random images with a few boxes (masks, segmentation, proposals), from mmdet's own test inputs."""
    from mmdet.testing import demo_mm_inputs
    from mmdet.testing._utils import demo_mm_proposals

    strides = [
        round(1 / node["scale_factor"])
        for node in walk(config.get("train_pipeline") or [])
        if node.get("type") == "SegRescale"
    ]
    with_semantic = _reads(config, "with_seg")
    shape = (3, size, size)
    batch = demo_mm_inputs(
        batch_size=num_images,
        image_shapes=shape,
        num_items=[3, 2][:num_images],
        with_mask=_reads(config, "with_mask"),
        with_semantic=with_semantic,
        sem_seg_output_strides=strides[0] if strides else 1,
    )
    num_classes = num_classes_of(model)
    panoptic = [node for node in walk(model) if "num_stuff_classes" in node]
    num_semantic = (
        sum(panoptic[0][key] for key in ("num_things_classes", "num_stuff_classes"))
        if panoptic
        else num_classes
    )
    for sample, proposals in zip(
        batch["data_samples"], demo_mm_proposals([shape] * num_images, 50), strict=True
    ):
        sample.gt_instances.labels %= num_classes
        if model["type"] == "FastRCNN":
            # A detector with an RPN of its own would take these in its place.
            sample.proposals = proposals
        if with_semantic:
            label = sample.gt_sem_seg.sem_seg
            label.copy_(torch.randint(0, num_semantic, label.shape))
    return batch


def _tracking_batch(model: dict, size: int) -> dict:
    """One video of two random frames, from mmdet's own test inputs."""
    from mmdet.testing._utils import demo_track_inputs

    batch = demo_track_inputs(
        batch_size=1,
        num_frames=2,
        key_frames_inds=[0],
        image_shapes=(3, size, size),
        num_items=[3],
        num_classes=num_classes_of(model),
        with_mask=True,
    )
    return batch


def _semi_supervised(batch: dict) -> dict:
    """The batch as the three branches of a semi-supervised detector."""
    for sample in batch["data_samples"]:
        sample.set_metainfo({"homography_matrix": torch.eye(3).numpy()})
    branches = ("sup", "unsup_teacher", "unsup_student")
    return {key: {branch: [x.clone() for x in batch[key]] for branch in branches} for key in batch}


def detection_batches(model: dict, config: Config, size: int) -> tuple[dict, dict]:
    """A batch to train on and one to predict on, of the kind that the model takes."""
    kind = model["data_preprocessor"]["type"]
    if kind == "TrackDataPreprocessor":
        video = functools.partial(_tracking_batch, model, size)
        if model["data_preprocessor"].get("use_det_processor"):
            return _detection_batch(model, config, size), video()
        return video(), video()
    if kind == "MultiBranchDataPreprocessor":
        train = _semi_supervised(_detection_batch(model, config, size))
    else:
        train = _detection_batch(model, config, size)
    return train, _detection_batch(model, config, size, num_images=1)


def segmentation_batch(model: dict, size: int, num_images: int = 2) -> dict:
    """Random images with labels in blocks, some of them the ignored 255."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    # Change detection stacks two images along the channels.
    channels = len(model["data_preprocessor"]["mean"])
    samples = []
    for _ in range(num_images):
        blocks = torch.randint(0, num_classes_of(model), (1, 8, 8))
        blocks[0, 0, :2] = 255
        label = blocks.repeat_interleave(size // 8, 1).repeat_interleave(size // 8, 2)
        shape = (size, size)
        sample = SegDataSample(
            metainfo={"img_shape": shape, "ori_shape": shape, "pad_shape": shape, "flip": False}
        )
        sample.gt_sem_seg = PixelData(data=label)
        edge = (label != label.roll(1, 1)) | (label != label.roll(1, 2))
        sample.gt_edge_map = PixelData(data=edge.long())
        samples.append(sample)
    images = [torch.randint(0, 256, (channels, size, size), dtype=torch.uint8) for _ in range(num_images)]
    return {"inputs": images, "data_samples": samples}


def make_batches(case: Case, model: dict, config: Config) -> tuple[dict, dict]:
    """Inputs for one training step (two images) and for one prediction (one image, as every config tests)."""
    size = image_size(case)
    if case.host == "mmdet":
        return detection_batches(model, config, size)
    return segmentation_batch(model, size), segmentation_batch(model, size, num_images=1)


@contextlib.contextmanager
def counted_ops() -> Iterator[Counter[str]]:
    """Count the calls into ``mmcv._ext`` inside this block."""
    ext = sys.modules["mmcv._ext"]
    calls: Counter[str] = Counter()

    def counting(name: str, op: Callable) -> Callable:
        @functools.wraps(op)
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return op(*args, **kwargs)

        return call

    ops = {name: op for name, op in vars(ext).items() if callable(op) and not name.startswith("_")}
    vars(ext).update({name: counting(name, op) for name, op in ops.items()})
    try:
        yield calls
    finally:
        vars(ext).update(ops)


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Inside this block remote weights raise: `DownloadRefused` by mmengine, OSError by Hugging Face."""

    def refuse(filename: str, *args: Any, **kwargs: Any) -> None:
        raise DownloadRefused(f"{filename} would be fetched")

    schemes = dict(CheckpointLoader._schemes)
    CheckpointLoader._schemes.update({prefix: refuse for prefix in schemes if prefix})
    hub = sys.modules.get("huggingface_hub.constants", types.SimpleNamespace(HF_HUB_OFFLINE=False))
    before = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before
        CheckpointLoader._schemes.clear()
        CheckpointLoader._schemes.update(schemes)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside this block the hosts do not log (they list every parameter they initialise), warn or print."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


class GradientProbe(OptimWrapper):
    """An OptimWrapper that looks at the gradients before it steps."""

    reached = 0
    trainable = 0
    finite = True

    def step(self, **kwargs: Any) -> None:
        """Note how many parameters got a gradient that is not zero, then step."""
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        grads = [p.grad for p in params if p.grad is not None]
        self.trainable = len(params)
        self.finite = all(bool(grad.isfinite().all()) for grad in grads)
        self.reached = sum(bool(grad.any()) for grad in grads)
        super().step(**kwargs)


def _finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor.float()).all()) for tensor in tensors)


def _check(condition: bool, text: str) -> None:
    if not condition:
        raise ValueError(f"the prediction is not well formed: {text}")


def describe_instances(found: Any) -> str:
    """Check one image's instances and say how many there are."""
    scores = found.scores
    _check("bboxes" in found or "masks" in found, f"neither boxes nor masks among {found.keys()}")
    _check(scores.shape == found.labels.shape and _finite(scores), "scores do not go with the labels")
    if "bboxes" in found:
        _check(
            found.bboxes.shape == (len(scores), 4) and _finite(found.bboxes),
            "boxes do not go with the scores",
        )
    if "masks" in found:
        _check(len(found.masks) == len(scores), "masks do not go with the scores")
    return f"{len(scores)} {'masks' if 'masks' in found else 'boxes'}"


def describe_sample(sample: Any) -> str:
    """Check one sample's prediction and say what it holds.

    Raises:
        ValueError: If it holds nothing that a detector, tracker or segmentor predicts, or it is malformed.
    """
    if "video_data_samples" in sample:
        return " + ".join(describe_sample(frame) for frame in sample.video_data_samples)
    if "pred_sem_seg" in sample:
        label, logits = sample.pred_sem_seg.data, sample.seg_logits.data
        _check(label.shape[-2:] == sample.ori_shape, f"label map is {tuple(label.shape)}")
        _check(_finite(logits) and not bool(logits.isnan().any()), "logits are not finite")
        return f"map of {label.unique().numel()} classes"
    if "pred_panoptic_seg" in sample:
        segments = sample.pred_panoptic_seg.sem_seg
        _check(segments.shape[-2:] == sample.ori_shape, f"panoptic map is {tuple(segments.shape)}")
        return f"{segments.unique().numel()} segments"
    if "pred_track_instances" in sample:
        tracks = sample.pred_track_instances
        _check(len(tracks.instances_id) == len(tracks.scores), "track ids do not go with the scores")
        return f"{len(tracks.scores)} tracks"
    _check("pred_instances" in sample, f"only {sample.keys()}")
    return describe_instances(sample.pred_instances)


def initialise(model: nn.Module) -> None:
    """Small random values for all weights; biases and gains keep those of their constructors."""
    for param in model.parameters():
        if param.ndim > 1:
            nn.init.normal_(param, std=0.02)


def wake(model: nn.Module) -> None:
    """Raise gains of normalisation layers that start at zero, as ResNet's last one in each block does.

    Pretrained weights would replace them; at zero, no gradient would reach the layers inside the block.
    """
    for module in model.modules():
        gain = getattr(module, "weight", None)
        if (
            isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm)
            and gain is not None
            and not gain.any()
        ):
            nn.init.constant_(gain, 0.2)


def calibrate(model: nn.Module, batch: dict) -> None:
    """Give batch normalisation the running statistics of the training images, as pretrained weights would.

    Most detectors normalise with these even while they train; with the initial ones the activations of a
    deep net explode.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    inputs = batch["inputs"]
    part = getattr(model, "detector", model)
    if not norms or not isinstance(inputs, list) or inputs[0].ndim != 3 or not hasattr(part, "extract_feat"):
        return
    images = model.data_preprocessor(copy.deepcopy(batch), training=True)["inputs"]
    settings = [(norm.momentum, norm.eps) for norm in norms]
    for norm in norms:
        norm.train()
        # PyTorch refuses the eps of 0 that NAS-FCOS has; its frozen layers never train.
        norm.momentum, norm.eps = 1.0, max(norm.eps, 1e-5)
    with torch.no_grad():
        part.extract_feat(images)
    for norm, setting in zip(norms, settings, strict=True):
        norm.momentum, norm.eps = setting


def has_training(model: nn.Module) -> bool:
    """Whether the host defines a loss; DeepSORT and StrongSORT only join parts that are trained alone."""
    return type(model).__name__ not in ("DeepSORT", "StrongSORT")


def train_one_step(model: nn.Module, batch: dict, outcome: Outcome) -> None:
    """One step through ``model.train_step``.

    Raises:
        ValueError: If the loss or a gradient is not finite, or every gradient is zero.
    """
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    # The gradients of an untrained network may be huge; a step of bounded length keeps it able to predict.
    probe = GradientProbe(torch.optim.SGD(params, lr=1e-4), clip_grad={"max_norm": 1.0})
    logs = model.train_step(batch, probe)
    outcome.loss = float(logs["loss"].detach())
    outcome.gradients = f"{probe.reached}/{probe.trainable}"
    if not math.isfinite(outcome.loss) or not probe.finite:
        raise ValueError(
            f"the loss is {outcome.loss}, gradients finite: {probe.finite}; both must be finite."
        )
    if not probe.reached:
        raise ValueError(f"none of {probe.trainable} parameters got a gradient that is not zero.")


def predict(model: nn.Module, batch: dict, outcome: Outcome) -> None:
    """One ``model.test_step``, its result checked."""
    model.eval()
    with torch.no_grad():
        results = model.test_step(batch)
    outcome.result = "; ".join(describe_sample(sample) for sample in results)


def run_stages(case: Case, outcome: Outcome) -> None:
    """Build, train one step, predict; ``outcome`` shows how far it came when a stage raises."""
    torch.manual_seed(SEED)
    for key, value in {"iter": 0, "max_iters": 1000, "epoch": 0, "max_epochs": 10}.items():
        # A Runner tells these to the hub; some losses and batch augmentations ask for them.
        MessageHub.get_current_instance().update_info(key, value)
    model_cfg, config = load_model_config(case)
    init_default_scope(config.get("default_scope", case.host))
    registry = importlib.import_module(f"{case.host}.registry")
    model = registry.MODELS.build(model_cfg)
    if case.config in NEEDS_PRETRAINED:
        initialise(model)
    else:
        model.init_weights()
    wake(model)
    outcome.params = sum(p.numel() for p in model.parameters())
    outcome.built = True
    # Read the config again: building a model may take keys out of it.
    train_batch, test_batch = make_batches(case, load_model_config(case)[0], config)
    failures = _stage(functools.partial(calibrate, model, train_batch))
    if has_training(model) and not failures:
        failures += _stage(functools.partial(train_one_step, model, train_batch, outcome))
        outcome.trained = not failures
    elif not failures:
        outcome.trained = None
    prediction = _stage(functools.partial(predict, model, test_batch, outcome))
    outcome.predicted = not prediction
    for failure in failures + prediction:
        raise failure


def _stage(stage: Callable[[], None]) -> list[Exception]:
    """Run a stage; a failed training step shall not hide whether the model predicts."""
    try:
        stage()
    except Exception as error:  # noqa: BLE001  whatever a foreign model raises is what the table shows
        return [error]
    return []


def check_config(case: Case) -> Outcome:
    """Run one config in this process and say what became of it."""
    outcome = Outcome()
    start = time.perf_counter()
    with counted_ops() as calls, offline(), quiet():
        try:
            run_stages(case, outcome)
        except Exception as error:  # noqa: BLE001  whatever a foreign model raises is what the table shows
            outcome.verdict, outcome.reason = classify(error)
            outcome.where = "".join(traceback.format_exception(error))[-6000:]
    if outcome.verdict == "works" and outcome.trained is None:
        outcome.reason = NO_TRAINING
    outcome.ops = dict(sorted(calls.items()))
    outcome.seconds = round(time.perf_counter() - start, 1)
    return outcome


NO_TRAINING = "mmdet trains its parts alone"

PACKAGE_PATTERNS = (
    r"No module named '(\w+)",
    r"mim install (\w+)",
    r"pip install (\w[\w-]*)",
    r"Please install (\w+) first",
    r"To use (VPD) model, please install required packages",
    r"Failed to import custom modules from \{'imports': \[?'(\w+)",
)
"""How the hosts and Python name a package that is not installed."""

PACKAGE_NAMES = {"sklearn": "scikit-learn", "skimage": "scikit-image", "VPD": "ldm"}
"""What to install where the message uses another name."""

UPSTREAM: tuple[tuple[str, str], ...] = (
    (
        "CascadeRPNHead.__init__() missing 1 required positional argument: 'num_classes'",
        "mmdet's RPN does not pass num_classes, which CascadeRPNHead requires; with it the stages refuse the "
        "config's key `sampling`",
    ),
)
"""Failures that lie in the hosts themselves: words of the message, and the cause."""


def classify(error: BaseException) -> tuple[str, str]:
    """The kind of a failure and its reason in one line."""
    text = " ".join(str(error).split())
    missing_op = re.search(r"mmcv op '(\w+)' has no portable version", text)
    if missing_op:
        return f"missing op {missing_op[1]}", "no portable version in mm_plugins.compat"
    if isinstance(error, DownloadRefused) or (isinstance(error, OSError) and "huggingface" in text):
        return "needs download", text[:160]
    for pattern in PACKAGE_PATTERNS:
        package = re.search(pattern, text)
        if package:
            return f"needs package {PACKAGE_NAMES.get(package[1], package[1])}", "not installed here"
    for words, cause in UPSTREAM:
        if words in text:
            return "fails upstream", cause
    return "fails", f"{type(error).__name__}: {text[:200]}"


def _work(case: Case) -> None:
    """Body of a worker process."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    torch.set_num_threads(1)
    save(case, check_config(case))


def save(case: Case, outcome: Outcome) -> None:
    """Keep an outcome as JSON."""
    case.record.parent.mkdir(parents=True, exist_ok=True)
    part = case.record.with_suffix(".part")
    part.write_text(json.dumps(dataclasses.asdict(outcome), indent=1), encoding="utf-8")
    part.replace(case.record)


def run_isolated(case: Case, timeout: float) -> Outcome:
    """Run a case in a forked process, which spares the three seconds that importing the hosts takes."""
    case.record.unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(target=_work, args=(case,))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        save(case, Outcome(verdict="fails", reason=f"no result after {timeout:.0f} s", seconds=timeout))
    elif not case.record.is_file():
        save(case, Outcome(verdict="fails", reason=f"the process ended with exit code {process.exitcode}"))
    return load(case)


def load(case: Case) -> Outcome:
    """A kept outcome."""
    return Outcome(**json.loads(case.record.read_text(encoding="utf-8")))


COLUMNS = ("host", "family", "config", "built", "trained", "predicted", "ops", "note")
PACKAGES = ("mmengine", "mmcv-lite", "mmdet", "mmsegmentation", "numpy")


def op_names(ops: Iterable[str]) -> list[str]:
    """Names of ops without their direction: ``roi_align`` for its forward and backward."""
    return sorted({re.sub(r"_(forward|backward).*", "", name) for name in ops})


def table_row(case: Case, outcome: Outcome) -> list[str]:
    """One row of the table in the docs."""
    words = {True: "yes", False: "no", None: "-"}
    stages = [words[stage] for stage in (outcome.built, outcome.trained, outcome.predicted)]
    parts = [part for part in (outcome.verdict, outcome.reason) if part and part != "works"]
    return [case.host, case.family, case.config, *stages, ", ".join(op_names(outcome.ops)), ": ".join(parts)]


def family_works(outcomes: Iterable[Outcome]) -> bool:
    """Whether every config of a family works."""
    return all(outcome.verdict == "works" for outcome in outcomes)


def counts(host: str, outcomes: dict[Case, Outcome]) -> str:
    """How many families and configs of a host came how far, in one sentence."""
    families: dict[str, list[Outcome]] = {}
    for case, outcome in outcomes.items():
        if case.host == host:
            families.setdefault(case.family, []).append(outcome)
    runs = [outcome for family in families.values() for outcome in family]
    works = sum(map(family_works, families.values()))
    trained = sum(bool(outcome.trained) for outcome in runs)
    without = sum(outcome.trained is None for outcome in runs)
    return (
        f"{host}: {works} of {len(families)} families work. Of {len(runs)} configs "
        f"{sum(outcome.built for outcome in runs)} were built, {trained} trained one step "
        f"({without} define no training), {sum(outcome.predicted for outcome in runs)} predicted."
    )


def verdict_counts(outcomes: dict[Case, Outcome]) -> str:
    """How many configs met each kind of failure, in one sentence."""
    kinds = Counter(outcome.verdict for outcome in outcomes.values() if outcome.verdict != "works")
    return "What stopped the others: " + ", ".join(f"{kind} ({n})" for kind, n in kinds.most_common()) + "."


def op_notes(outcomes: dict[Case, Outcome]) -> list[str]:
    """Which served ops the zoo called, and which it never did."""
    called = {name for outcome in outcomes.values() for name in outcome.ops}
    unused = sorted(set(mm_plugins.compat.PORTABLE_OPS) - called)
    return [
        f"Ops of mmcv that the zoo called: {', '.join(op_names(called))}.",
        f"Ops that are served but were never called on the CPU: {', '.join(unused)}.",
    ]


def skip_notes() -> list[str]:
    """The folders left out, with the reason."""
    reasons: dict[str, list[str]] = {}
    for host, folders in SKIPPED.items():
        for folder, reason in folders.items():
            reasons.setdefault(reason, []).append(f"{host}/{folder}")
    return [f"Left out: {', '.join(folders)} ({reason})." for reason, folders in reasons.items()]


def report(outcomes: dict[Case, Outcome], folder: Path | None = None) -> Path:
    """Write the result file that the docs show."""
    details = {}
    for case, outcome in outcomes.items():
        kept = dataclasses.asdict(outcome)
        # The traceback names folders of this machine.
        del kept["where"]
        details[case.name] = kept | {"loss": kept["loss"] if math.isfinite(kept["loss"]) else None}
    seconds = sum(outcome.seconds for outcome in outcomes.values())
    return write_result(
        "zoo",
        command="python -m benchmarks.zoo --fresh",
        config={"image_size": IMAGE_SIZE, "larger_images": LARGER_IMAGES, "at_most": FEW, "skipped": SKIPPED},
        seeds=[SEED],
        packages=PACKAGES,
        columns=COLUMNS,
        rows=[table_row(case, outcome) for case, outcome in outcomes.items()],
        notes=[
            *(counts(host, outcomes) for host in HOSTS),
            verdict_counts(outcomes),
            *op_notes(outcomes),
            *skip_notes(),
            f"The runs took {seconds / 60:.0f} minutes one after another on one core.",
        ],
        details=details,
        **({"folder": folder} if folder else {}),
    )


def main(argv: Sequence[str]) -> int:
    """Run the missing configs, then write the result file once every config has an outcome."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="run the configs whose host/family/config contains this")
    parser.add_argument("--fresh", action="store_true", help="run again what has an outcome already")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds one config may take")
    parser.add_argument("--short", action="store_true", help="one config: a check that it runs")
    args = parser.parse_args(argv)
    if args.short:
        args.only, args.fresh = "mmdet/retinanet/", True
    chosen = cases(args.only)
    # The first optimizer of a process imports torch._dynamo; here once, instead of in every worker.
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    for number, case in enumerate(chosen, start=1):
        ran = args.fresh or not case.record.is_file()
        outcome = run_isolated(case, args.timeout) if ran else load(case)
        stages = " ".join(table_row(case, outcome)[3:6])
        text = f"{outcome.verdict} {outcome.reason}".strip()
        print(f"[{number}/{len(chosen)}] {case.name}: {stages}, {text} ({outcome.seconds} s)", flush=True)
    missing = [case for case in cases() if not case.record.is_file()]
    if args.short:
        return 0
    if missing:
        print(f"{len(missing)} configs have no outcome yet; the result file is written once all have one.")
        return 0
    print(f"wrote {report({case: load(case) for case in cases()})}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
