"""SpatialFlow: panoptic segmentation in one stage, with flows from the box regressor to masks and stuff."""

from mm_plugins.spatialflow.dataset import CityscapesPanopticDataset, PanopticDataset
from mm_plugins.spatialflow.detector import SpatialFlow, SpatialFlowTTAModel
from mm_plugins.spatialflow.head import (
    SpatialFlowFusionHead,
    SpatialFlowHead,
    SpatialFlowMaskHead,
    SpatialFlowStuffHead,
)
from mm_plugins.spatialflow.hook import PanopticClassesHook
from mm_plugins.spatialflow.metric import PanopticQuality

__all__ = [
    "CityscapesPanopticDataset",
    "PanopticClassesHook",
    "PanopticDataset",
    "PanopticQuality",
    "SpatialFlow",
    "SpatialFlowFusionHead",
    "SpatialFlowHead",
    "SpatialFlowMaskHead",
    "SpatialFlowStuffHead",
    "SpatialFlowTTAModel",
]
