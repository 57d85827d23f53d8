# SpatialFlow R50 on COCO panoptic, 20 epochs (authors' release: PQ 41.8).
_base_ = [
    "./_base_/spatialflow_r50_fpn.py",
    "./_base_/coco_panoptic.py",
    "./_base_/schedule_20e.py",
    "mmdet::_base_/default_runtime.py",
]
default_hooks = dict(checkpoint=dict(save_best="coco_panoptic/PQ", rule="greater"))
