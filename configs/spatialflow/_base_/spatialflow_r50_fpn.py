# The published network (R50): heads, losses and post-processing as in the authors' release; the stuff loss has the
# release's effective weight (0.25 counted twice with two images a GPU).
custom_imports = dict(imports=["mm_plugins"], allow_failed_imports=False)
num_things = 80
num_stuff = 53

model = dict(
    type="SpatialFlow",
    data_preprocessor=dict(
        type="DetDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
        pad_mask=True,
        mask_pad_value=0,
        pad_seg=True,
        seg_pad_value=255,
    ),
    backbone=dict(
        type="ResNet",
        depth=50,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        frozen_stages=1,
        norm_cfg=dict(type="BN", requires_grad=True),
        norm_eval=True,
        style="pytorch",
        init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet50"),
    ),
    neck=dict(
        type="FPN",
        in_channels=[256, 512, 1024, 2048],
        out_channels=256,
        start_level=1,
        add_extra_convs="on_input",
        num_outs=5,
    ),
    bbox_head=dict(
        type="SpatialFlowHead",
        num_classes=num_things,
        in_channels=256,
        stacked_convs=4,
        stacked_mask_convs=1,
        stacked_stuff_convs=4,
        feat_channels=256,
        # Take names out of this tuple to switch flows off.
        flows=("cls", "stuff", "mask", "stuff_mask"),
        num_flow_levels=3,
        anchor_generator=dict(
            type="AnchorGenerator",
            octave_base_scale=4,
            scales_per_octave=3,
            ratios=[0.5, 1.0, 2.0],
            strides=[8, 16, 32, 64, 128],
        ),
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[1.0] * 4),
        loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type="L1Loss", loss_weight=1.0),
    ),
    roi_head=dict(
        type="SpatialFlowMaskHead",
        mask_roi_extractor=dict(
            type="SingleRoIExtractor",
            roi_layer=dict(type="RoIAlign", output_size=14, sampling_ratio=0),
            out_channels=256,
            featmap_strides=[8, 16, 32],
        ),
        mask_head=dict(
            type="FCNMaskHead",
            num_convs=4,
            in_channels=256,
            conv_out_channels=256,
            num_classes=num_things,
            loss_mask=dict(type="CrossEntropyLoss", use_mask=True, loss_weight=1.0),
        ),
    ),
    semantic_head=dict(
        type="SpatialFlowStuffHead",
        num_things_classes=num_things,
        num_stuff_classes=num_stuff,
        in_channels=256,
        feat_channels=128,
        feat_strides=(8, 16, 32),
        norm_cfg=dict(type="GN", num_groups=32, requires_grad=True),
        loss_seg=dict(type="CrossEntropyLoss", ignore_index=255, loss_weight=0.5),
    ),
    panoptic_fusion_head=dict(
        type="SpatialFlowFusionHead", num_things_classes=num_things, num_stuff_classes=num_stuff
    ),
    train_cfg=dict(
        det=dict(
            assigner=dict(
                type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0, ignore_iof_thr=-1
            ),
            sampler=dict(type="PseudoSampler"),
            allowed_border=-1,
            pos_weight=-1,
            debug=False,
        ),
        det_proposal=dict(
            nms_pre=1000,
            min_bbox_size=0,
            score_thr=0.05,
            nms=dict(type="nms", iou_threshold=0.4),
            max_per_img=100,
        ),
        mask=dict(
            assigner=dict(
                type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5, ignore_iof_thr=-1
            ),
            # All positive boxes and all annotated ones, no negatives.
            sampler=dict(
                type="RandomSampler", num=2048, pos_fraction=1.0, neg_pos_ub=0, add_gt_as_proposals=True
            ),
            mask_size=28,
            pos_weight=-1,
            debug=False,
        ),
    ),
    test_cfg=dict(
        det=dict(
            nms_pre=1000,
            min_bbox_size=0,
            score_thr=0.05,
            nms=dict(type="nms", iou_threshold=0.4),
            max_per_img=100,
        ),
        mask=dict(mask_thr_binary=0.5),
        panoptic=dict(score_thr=0.37, mask_overlap=0.37, stuff_area_limit=4900, box_fill=0.5),
    ),
)
custom_hooks = [dict(type="PanopticClassesHook")]
