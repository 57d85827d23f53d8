# A quarter-width ResNet-18 with 64 channels in pyramid and heads: trains from scratch on a CPU.
_base_ = ["./spatialflow_r50_fpn.py", "mmdet::_base_/default_runtime.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="ResNet",
        depth=18,
        base_channels=16,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        frozen_stages=-1,
        # From scratch, on few small crops: statistics of a batch are not those of a whole image.
        norm_cfg=dict(type="GN", num_groups=8, requires_grad=True),
        norm_eval=False,
        style="pytorch",
        # Blocks that start as the identity cost a small network its first steps.
        zero_init_residual=False,
    ),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=64),
    bbox_head=dict(
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        stacked_stuff_convs=2,
        # Small objects: anchors from 16 pixels on.
        anchor_generator=dict(octave_base_scale=2),
        # From scratch, N(0, 0.01) lets the signal fade; Kaiming lets the sums of flows and features grow.
        init_cfg=dict(
            type="Xavier",
            layer="Conv2d",
            distribution="uniform",
            override=[
                dict(type="Normal", name="retina_cls", std=0.01, bias_prob=0.01),
                dict(type="Normal", name="retina_reg", std=0.01),
            ],
        ),
    ),
    roi_head=dict(
        mask_roi_extractor=dict(out_channels=64),
        mask_head=dict(num_convs=2, in_channels=64, conv_out_channels=64),
    ),
    semantic_head=dict(
        in_channels=64, feat_channels=32, norm_cfg=dict(type="GN", num_groups=8, requires_grad=True)
    ),
)
