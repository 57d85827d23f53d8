# SegFormer-B0 on ADE20K with LaU from its stride of 4 to the pixels; the head's rate is ten times the backbone's.
_base_ = ["mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py"]
custom_imports = dict(imports=["mm_plugins"], allow_failed_imports=False)

model = dict(
    decode_head=dict(
        type="LaUSegformerHead",
        lau=dict(
            scale_factor=4,
            mid_channels=64,
            base_grid="half_pixel",
            init="small",
            loss=dict(mode="reg", lambda_=0.3, gamma=0.1),
        ),
    ),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"decode_head.lau": dict(decay_mult=0.0, lr_mult=10.0)}))
