"""Mask R-CNN Swin-S teaches FCOS R50, COCO, 24 epochs.

Published by the authors: 39.1 -> 43.9 box mAP, without a config; which FCOS recipe that was is not known, this
is mmdet's multi-scale one. Its images are caffe-style (BGR, std 1) and are mapped to the teacher's format.
Teacher weights are downloaded at the first run; for a local file add
--cfg-options model.distill.teacher_ckpt=PATH. 16 images per step (8 GPUs x 2).
"""

_base_ = ["mmdet::fcos/fcos_r50-caffe_fpn_gn-head_ms-640-800-2x_coco.py"]
custom_imports = dict(imports=["mm_plugins"], allow_failed_imports=False)
model = dict(
    type="PKDDetector",
    student_type=_base_.model.type,
    distill=dict(
        teacher="mmdet::swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py",
        teacher_ckpt="https://download.openmmlab.com/mmdetection/v2.0/swin/mask_rcnn_swin-s-p4-w7_fpn_fp16_ms-crop-3x_coco/mask_rcnn_swin-s-p4-w7_fpn_fp16_ms-crop-3x_coco_20210903_104808-b92c91f1.pth",
        loss=dict(type="PKDLoss", loss_weight=6.0),
    ),
)
