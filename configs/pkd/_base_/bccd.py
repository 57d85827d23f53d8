# Blood cells (BCCD, MIT) at 320x240: 205 training and 87 validation images, three classes. Origin: tests/data/bccd.
# Small on purpose: every detector on top of this file trains from scratch in minutes on two CPU cores.
_base_ = ["mmdet::_base_/default_runtime.py"]
custom_imports = dict(imports=["mm_plugins"], allow_failed_imports=False)

data_root = "tests/data/bccd/"
metainfo = dict(classes=("RBC", "WBC", "Platelets"), palette=[(200, 60, 60), (70, 110, 220), (60, 170, 90)])
max_epochs = 12
batch_size = 8

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomFlip", prob=0.5, direction=["horizontal", "vertical"]),
    dict(type="Resize", scale=(320, 240), keep_ratio=True),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(320, 240), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    batch_sampler=dict(type="AspectRatioBatchSampler"),
    dataset=dict(
        type="CocoDataset",
        data_root=data_root,
        metainfo=metainfo,
        ann_file="train.json",
        data_prefix=dict(img=""),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="CocoDataset",
        data_root=data_root,
        metainfo=metainfo,
        ann_file="val.json",
        data_prefix=dict(img=""),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="CocoMetric", ann_file=data_root + "val.json", metric="bbox")
test_evaluator = val_evaluator

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=2)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

# One cycle of AdamW: what trains a small detector from scratch in few epochs.
max_lr = 2e-3
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
    logger=dict(type="LoggerHook", interval=13),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=1),
)
randomness = dict(seed=0)
