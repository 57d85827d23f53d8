"""Mask R-CNN Swin-S teaches RetinaNet R50, COCO, 24 epochs. Levels are paired by index, as published.

Published by the authors: 37.4 -> 41.5 box mAP. Teacher weights are downloaded at the first run; for a local
file add --cfg-options model.distill.teacher_ckpt=PATH. 16 images per step (8 GPUs x 2).
"""

_base_ = ["mmdet::retinanet/retinanet_r50_fpn_2x_coco.py"]
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
optim_wrapper = dict(optimizer=dict(lr=0.01))
