# Baseline: FCN, logits enlarged 8 times by bilinear interpolation (half-pixel, mmseg's default).
_base_ = ["./_base_/camvid.py"]
