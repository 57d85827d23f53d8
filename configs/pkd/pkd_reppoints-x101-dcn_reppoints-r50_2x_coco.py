"""RepPoints X101-DCN teaches RepPoints R50 (GN in neck and head), COCO, 24 epochs.

Published by the authors: 38.6 -> 42.3 box mAP. Teacher weights are downloaded at the first run; for a local
file add --cfg-options model.distill.teacher_ckpt=PATH. 16 images per step (8 GPUs x 2).
"""

_base_ = ["mmdet::reppoints/reppoints-moment_r50_fpn-gn_head-gn_2x_coco.py"]
custom_imports = dict(imports=["mm_plugins"], allow_failed_imports=False)
model = dict(
    type="PKDDetector",
    student_type=_base_.model.type,
    distill=dict(
        teacher="mmdet::reppoints/reppoints-moment_x101-dconv-c3-c5_fpn-gn_head-gn_2x_coco.py",
        teacher_ckpt="https://download.openmmlab.com/mmdetection/v2.0/reppoints/reppoints_moment_x101_fpn_dconv_c3-c5_gn-neck%2Bhead_2x_coco/reppoints_moment_x101_fpn_dconv_c3-c5_gn-neck%2Bhead_2x_coco_20200329-f87da1ea.pth",
        loss=dict(type="PKDLoss", loss_weight=10.0),
    ),
)
optim_wrapper = dict(optimizer=dict(lr=0.01))
