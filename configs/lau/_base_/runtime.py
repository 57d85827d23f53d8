# What the small configs share: a quarter-width ResNet-18 at stride 8, one cycle of AdamW, no pretraining.
_base_ = ["mmseg::_base_/default_runtime.py"]
custom_imports = dict(imports=["mm_plugins"], allow_failed_imports=False)

max_epochs = 40
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(128, 128),
    ),
    backbone=dict(
        type="ResNetV1c",
        depth=18,
        base_channels=16,
        stem_channels=16,
        num_stages=3,
        strides=(1, 2, 1),
        dilations=(1, 1, 2),
        out_indices=(0, 1, 2),
        norm_cfg=dict(type="BN", requires_grad=True),
        norm_eval=False,
        style="pytorch",
        contract_dilation=True,
    ),
    decode_head=dict(
        type="FCNHead",
        in_channels=64,
        in_index=2,
        channels=64,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=2,
        norm_cfg=dict(type="BN", requires_grad=True),
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", loss_weight=1.0),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=10)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
val_evaluator = [dict(type="IoUMetric", iou_metrics=["mIoU"]), dict(type="BoundaryIoUMetric")]
test_evaluator = val_evaluator

max_lr = 4e-3
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=max_lr, weight_decay=0.01),
    clip_grad=dict(max_norm=5.0),
    # As in the authors' scripts, offsets are not decayed towards 0. The longest matching key wins.
    paramwise_cfg=dict(custom_keys={"decode_head.lau": dict(decay_mult=0.0)}),
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
    logger=dict(type="LoggerHook", interval=10, log_metric_by_epoch=True),
    checkpoint=dict(type="CheckpointHook", by_epoch=True, interval=10, max_keep_ckpts=1),
)
log_processor = dict(by_epoch=True)
randomness = dict(seed=0)
