# Cityscapes, 8 things and 11 stuff classes. The authors released no Cityscapes config: crop, schedule and the area limit
# are the usual choices for this data set, not the paper's.
# Annotation: pip install cityscapesscripts; csCreatePanopticImgs --set-names train val
_base_ = [
    "./_base_/spatialflow_r50_fpn.py",
    "./_base_/schedule_20e.py",
    "mmdet::_base_/default_runtime.py",
]

num_things = 8
num_stuff = 11
model = dict(
    bbox_head=dict(num_classes=num_things),
    roi_head=dict(mask_head=dict(num_classes=num_things)),
    semantic_head=dict(num_things_classes=num_things, num_stuff_classes=num_stuff),
    panoptic_fusion_head=dict(num_things_classes=num_things, num_stuff_classes=num_stuff),
    test_cfg=dict(panoptic=dict(stuff_area_limit=2048)),
)
data_root = "data/cityscapes/"
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadPanopticAnnotations"),
    dict(type="RandomResize", scale=[(2048, 800), (2048, 1024)], keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 1024), keep_ratio=True),
    dict(type="LoadPanopticAnnotations"),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="CityscapesPanopticDataset",
        data_root=data_root,
        ann_file="gtFine/cityscapes_panoptic_train.json",
        data_prefix=dict(img="leftImg8bit/train/", seg="gtFine/cityscapes_panoptic_train/"),
        filter_cfg=dict(filter_empty_gt=False),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="CityscapesPanopticDataset",
        data_root=data_root,
        ann_file="gtFine/cityscapes_panoptic_val.json",
        data_prefix=dict(img="leftImg8bit/val/", seg="gtFine/cityscapes_panoptic_val/"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type="PanopticQuality",
    ann_file=data_root + "gtFine/cityscapes_panoptic_val.json",
    seg_prefix=data_root + "gtFine/cityscapes_panoptic_val/",
)
test_evaluator = val_evaluator
default_hooks = dict(checkpoint=dict(save_best="coco_panoptic/PQ", rule="greater"))
