# Nuclei of the 2018 Data Science Bowl (CC0): one thing class and the background. The few images of tests/data/nuclei
# serve to try things out; point data_root to the larger subset for results.
_base_ = ["./_base_/small.py"]

data_root = "tests/data/nuclei/"
metainfo = dict(
    classes=("nucleus", "background"),
    thing_classes=("nucleus",),
    stuff_classes=("background",),
    palette=[(90, 190, 250), (30, 30, 40)],
)
model = dict(
    # Strides 8 to 32 are enough for nuclei. On the crops of training the levels above have one or two cells, all border; on the
    # larger images of testing they answered with boxes as large as the image.
    neck=dict(num_outs=3),
    bbox_head=dict(
        num_classes=1,
        anchor_generator=dict(strides=[8, 16, 32]),
        bbox_coder=dict(target_stds=[0.1, 0.1, 0.2, 0.2]),
    ),
    # Nuclei are about 20 pixels wide: masks of 14x14 do.
    roi_head=dict(mask_roi_extractor=dict(roi_layer=dict(output_size=7)), mask_head=dict(num_classes=1)),
    semantic_head=dict(num_things_classes=1, num_stuff_classes=1),
    panoptic_fusion_head=dict(num_things_classes=1, num_stuff_classes=1),
    # Masks learn on the annotated boxes and few others: with crowded images, that is where the time goes. Boxes below 0.3
    # would cost time in testing and no one sees them: fusion starts at 0.37. Background is laid however small it is.
    train_cfg=dict(det_proposal=dict(max_per_img=20), mask=dict(mask_size=14)),
    test_cfg=dict(det=dict(score_thr=0.3, max_per_img=400), panoptic=dict(stuff_area_limit=64)),
)
max_epochs = 4
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadPanopticAnnotations"),
    dict(type="RandomCrop", crop_size=(128, 128), recompute_bbox=True, allow_negative_crop=True),
    # A crop may keep no pixel of a mask.
    dict(type="FilterAnnotations", min_gt_bbox_wh=(2, 2), keep_empty=False),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="RandomFlip", prob=0.5, direction="vertical"),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(256, 256), keep_ratio=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
tta_model = dict(type="SpatialFlowTTAModel")
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="Resize", scale=(side, side), keep_ratio=True) for side in (256, 320)],
            [dict(type="RandomFlip", prob=0.0), dict(type="RandomFlip", prob=1.0)],
            [
                dict(
                    type="PackDetInputs",
                    meta_keys=(
                        "img_id",
                        "img_path",
                        "ori_shape",
                        "img_shape",
                        "scale_factor",
                        "flip",
                        "flip_direction",
                    ),
                )
            ],
        ],
    ),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="PanopticDataset",
        data_root=data_root,
        metainfo=metainfo,
        ann_file="panoptic_train.json",
        data_prefix=dict(img="images/train/", seg="panoptic/train/"),
        filter_cfg=dict(filter_empty_gt=False),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="PanopticDataset",
        data_root=data_root,
        metainfo=metainfo,
        ann_file="panoptic_val.json",
        data_prefix=dict(img="images/val/", seg="panoptic/val/"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type="PanopticQuality", ann_file=data_root + "panoptic_val.json", seg_prefix=data_root + "panoptic/val/"
)
test_evaluator = val_evaluator

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=4)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
max_lr = 4e-3
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=max_lr, weight_decay=0.05),
    clip_grad=dict(max_norm=10.0),
)
param_scheduler = [
    dict(
        type="OneCycleLR",
        eta_max=max_lr,
        total_steps=max_epochs,
        by_epoch=True,
        convert_to_iter_based=True,
        pct_start=0.25,
    )
]
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=4),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=1),
)
randomness = dict(seed=0)
