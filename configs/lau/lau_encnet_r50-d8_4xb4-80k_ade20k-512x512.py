# EncNet with LaU on ADE20K, on top of mmseg's own config; options of the authors' scripts (see the README for
# what differs: crop, schedule and backbone are mmseg's).
_base_ = ["mmseg::encnet/encnet_r50-d8_4xb4-80k_ade20k-512x512.py"]
custom_imports = dict(imports=["mm_plugins"], allow_failed_imports=False)

model = dict(
    decode_head=dict(
        type="LaUEncHead",
        lau=dict(
            scale_factor=4,
            mid_channels=128,
            base_grid="half_pixel",
            init="small",
            loss=dict(mode="reg", lambda_=0.3, gamma=0.1),
        ),
    ),
)
# Ten times the backbone's rate for the heads; no decay of the offsets. The longest matching key counts alone.
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            "decode_head": dict(lr_mult=10.0),
            "auxiliary_head": dict(lr_mult=10.0),
            "decode_head.lau": dict(lr_mult=10.0, decay_mult=0.0),
        }
    )
)
