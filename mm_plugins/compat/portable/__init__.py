"""Pure PyTorch versions of the functions that ``mmcv.ops`` asks of its compiled extension."""
