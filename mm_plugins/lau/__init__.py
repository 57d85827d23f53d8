"""LaU: location-aware upsampling and its losses for any mmseg head."""

from mm_plugins.lau.boundary import boundary_iou
from mm_plugins.lau.head import LaUHead, LaUMixin, wrap_head
from mm_plugins.lau.loss import LocationAwareLoss
from mm_plugins.lau.metric import BoundaryIoUMetric
from mm_plugins.lau.sampling import location_aware_upsample
from mm_plugins.lau.upsample import LaUUpsample

__all__ = [
    "BoundaryIoUMetric",
    "LaUHead",
    "LaUMixin",
    "LaUUpsample",
    "LocationAwareLoss",
    "boundary_iou",
    "location_aware_upsample",
    "wrap_head",
]
