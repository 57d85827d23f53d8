# The release's stuff loss fault by fault (N times too large, area of the first image, padding trained as class 0), for
# comparisons with the authors' runs.
_base_ = ["./spatialflow_r50_fpn_20e_coco.py"]

model = dict(
    data_preprocessor=dict(seg_pad_value=255),
    semantic_head=dict(
        normalise="official",
        legacy_resize=True,
        loss_seg=dict(type="CrossEntropyLoss", ignore_index=255, loss_weight=0.25),
    ),
)
