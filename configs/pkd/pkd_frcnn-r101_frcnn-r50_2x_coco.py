"""Faster R-CNN R101 teaches Faster R-CNN R50, COCO, 24 epochs.

Published by the authors: 38.4 -> 40.3 box mAP (40.4 in their metafile). Teacher weights are downloaded at the
first run; for a local file add --cfg-options model.distill.teacher_ckpt=PATH. 16 images per step (8 GPUs x
2).
"""

_base_ = ["mmdet::faster_rcnn/faster-rcnn_r50_fpn_2x_coco.py"]
custom_imports = dict(imports=["mm_plugins"], allow_failed_imports=False)
model = dict(
    type="PKDDetector",
    student_type=_base_.model.type,
    distill=dict(
        teacher="mmdet::faster_rcnn/faster-rcnn_r101_fpn_2x_coco.py",
        teacher_ckpt="https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r101_fpn_2x_coco/faster_rcnn_r101_fpn_2x_coco_bbox_mAP-0.398_20200504_210455-1d2dac9c.pth",
        loss=dict(type="PKDLoss", loss_weight=6.0),
    ),
)
