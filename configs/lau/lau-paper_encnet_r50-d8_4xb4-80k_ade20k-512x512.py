# The paper's preset: sampling at p/k, Xavier initialisation, auxiliary losses at 0.2.
_base_ = ["./lau_encnet_r50-d8_4xb4-80k_ade20k-512x512.py"]

model = dict(
    decode_head=dict(align_corners=True, lau=dict(base_grid="asymmetric", init="xavier")),
    auxiliary_head=dict(align_corners=True, loss_decode=dict(loss_weight=0.2)),
)
