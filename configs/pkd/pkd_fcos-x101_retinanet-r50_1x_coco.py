"""FCOS X101-64x4d teaches RetinaNet R50, COCO, 12 epochs.

Published by the authors: 36.5 -> 40.3 box mAP. Teacher weights are downloaded at the first run; for a local
file add --cfg-options model.distill.teacher_ckpt=PATH. 16 images per step (8 GPUs x 2).
"""

_base_ = ["mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"]
custom_imports = dict(imports=["mm_plugins"], allow_failed_imports=False)
model = dict(
    type="PKDDetector",
    student_type=_base_.model.type,
    distill=dict(
        teacher="mmdet::fcos/fcos_x101-64x4d_fpn_gn-head_ms-640-800-2x_coco.py",
        teacher_ckpt="https://download.openmmlab.com/mmdetection/v2.0/fcos/fcos_x101_64x4d_fpn_gn-head_mstrain_640-800_2x_coco/fcos_x101_64x4d_fpn_gn-head_mstrain_640-800_2x_coco-ede514a8.pth",
        loss=dict(type="PKDLoss", loss_weight=10.0),
    ),
)
optim_wrapper = dict(optimizer=dict(lr=0.01))
