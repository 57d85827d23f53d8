# SpatialFlow R101 with deformable convolutions, steered by the flows in the heads; multi-scale training, fp16; test with
# --tta for the published six views (authors' release: PQ 48.0 on val, 48.5 on test-dev).
_base_ = ["./spatialflow_r101_fpn_20e_coco.py"]

model = dict(
    backbone=dict(
        dcn=dict(type="DCNv2", deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True),
    ),
    bbox_head=dict(dcn_cls_convs_idx=[0, 1, 2, 3], dcn_stuff_convs_idx=[0, 1, 2, 3], dcn_mask_convs_idx=[0]),
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadPanopticAnnotations"),
    dict(type="RandomResize", scale=[(1600, 400), (1600, 1400)], keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
optim_wrapper = dict(type="AmpOptimWrapper", loss_scale=512.0)
