# COCO panoptic as mmdet loads it; panoptic quality without panopticapi, and views for --tta.
_base_ = ["mmdet::_base_/datasets/coco_panoptic.py"]

data_root = "data/coco/"
val_evaluator = dict(
    _delete_=True,
    type="PanopticQuality",
    ann_file=data_root + "annotations/panoptic_val2017.json",
    seg_prefix=data_root + "annotations/panoptic_val2017/",
)
test_evaluator = val_evaluator
tta_model = dict(type="SpatialFlowTTAModel")
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [
                dict(type="Resize", scale=scale, keep_ratio=True)
                for scale in ((1500, 1000), (1800, 1200), (2100, 1400))
            ],
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
