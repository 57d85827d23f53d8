# DeepLabV3+ on ADE20K with LaU from its stride of 4 to the pixels, on top of mmseg's own config.
_base_ = ["mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb4-80k_ade20k-512x512.py"]
custom_imports = dict(imports=["mm_plugins"], allow_failed_imports=False)

model = dict(
    decode_head=dict(
        type="LaUDepthwiseSeparableASPPHead",
        lau=dict(
            scale_factor=4,
            mid_channels=64,
            base_grid="half_pixel",
            init="small",
            loss=dict(mode="reg", lambda_=0.3, gamma=0.1),
        ),
    ),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"decode_head.lau": dict(decay_mult=0.0)}))
