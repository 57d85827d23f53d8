"""PKD: Pearson-correlation distillation between any two detectors of mmdet."""

from mm_plugins.pkd.detector import PKDDetector
from mm_plugins.pkd.hook import PKDHook
from mm_plugins.pkd.loss import PKDLoss, PlainMSELoss
from mm_plugins.pkd.pearson import standardised_mse

__all__ = ["PKDDetector", "PKDHook", "PKDLoss", "PlainMSELoss", "standardised_mse"]
