# CamVid (street scenes, 11 classes, thin poles and signs) as images/{train,val} and labels/{train,val}, index
# PNG with 255 for unlabelled pixels. Its licence does not allow shipping images here: set data_root.
_base_ = ["./runtime.py"]

data_root = "data/camvid/"
metainfo = dict(
    classes=(
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "sign",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    ),
    palette=[
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (60, 40, 222),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    ],
)
max_epochs = 60
model = dict(data_preprocessor=dict(size=(128, 128)), decode_head=dict(num_classes=11))
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomCrop", crop_size=(128, 128), cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
# For `tools/mm.py test CONFIG CHECKPOINT --tta`.
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="RandomFlip", prob=0.0), dict(type="RandomFlip", prob=1.0)],
            [dict(type="LoadAnnotations")],
            [dict(type="PackSegInputs")],
        ],
    ),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="BaseSegDataset",
        data_root=data_root,
        metainfo=metainfo,
        data_prefix=dict(img_path="images/train", seg_map_path="labels/train"),
        img_suffix=".jpg",
        seg_map_suffix=".png",
        reduce_zero_label=False,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="BaseSegDataset",
        data_root=data_root,
        metainfo=metainfo,
        data_prefix=dict(img_path="images/val", seg_map_path="labels/val"),
        img_suffix=".jpg",
        seg_map_suffix=".png",
        reduce_zero_label=False,
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=max_epochs, val_interval=20)
param_scheduler = [
    dict(
        type="OneCycleLR",
        eta_max=4e-3,
        total_steps=max_epochs,
        by_epoch=True,
        convert_to_iter_based=True,
        pct_start=0.25,
    )
]
