# EncNet with LaU on the 59 classes of PASCAL Context; the parts are mmseg's, which has no EncNet of this set.
_base_ = [
    "mmseg::_base_/models/encnet_r50-d8.py",
    "mmseg::_base_/datasets/pascal_context_59.py",
    "mmseg::_base_/default_runtime.py",
    "mmseg::_base_/schedules/schedule_80k.py",
]
custom_imports = dict(imports=["mm_plugins"], allow_failed_imports=False)

crop_size = (480, 480)
model = dict(
    data_preprocessor=dict(size=crop_size),
    decode_head=dict(
        type="LaUEncHead",
        num_classes=59,
        lau=dict(
            scale_factor=4,
            mid_channels=64,
            base_grid="half_pixel",
            init="small",
            loss=dict(mode="reg", lambda_=0.3, gamma=0.1),
        ),
    ),
    auxiliary_head=dict(num_classes=59),
    test_cfg=dict(mode="slide", crop_size=(480, 480), stride=(320, 320)),
)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.001, momentum=0.9, weight_decay=0.0001),
    paramwise_cfg=dict(
        custom_keys={
            "decode_head": dict(lr_mult=10.0),
            "auxiliary_head": dict(lr_mult=10.0),
            "decode_head.lau": dict(lr_mult=10.0, decay_mult=0.0),
        }
    ),
)
