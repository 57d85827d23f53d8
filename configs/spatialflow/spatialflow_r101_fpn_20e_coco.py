# SpatialFlow R101 on COCO panoptic, 20 epochs (authors' release: PQ 43.4).
_base_ = ["./spatialflow_r50_fpn_20e_coco.py"]

model = dict(backbone=dict(depth=101, init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet101")))
