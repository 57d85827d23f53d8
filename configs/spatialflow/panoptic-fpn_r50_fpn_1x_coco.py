# mmdet's own PanopticFPN, evaluated without panopticapi: any panoptic model of mmdet takes the metric this way.
_base_ = ["mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py"]
custom_imports = dict(imports=["mm_plugins"], allow_failed_imports=False)

data_root = "data/coco/"
val_evaluator = dict(
    _delete_=True,
    type="PanopticQuality",
    ann_file=data_root + "annotations/panoptic_val2017.json",
    seg_prefix=data_root + "annotations/panoptic_val2017/",
)
test_evaluator = val_evaluator
