# Control: the same teacher and student, imitation by plain MSE of the feature maps (not standardised).
# Weight 2.5: this teacher's maps have a mean square near 3.6, so the sum of the four losses begins near 36,
# as strong as PKD's (about 38 at weight 10).
_base_ = ["./pkd_fcos_retinanet_r18_bccd.py"]

model = dict(distill=dict(loss=dict(_delete_=True, type="PlainMSELoss", loss_weight=2.5)))
