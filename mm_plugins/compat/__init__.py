"""What keeps mmengine 0.10, mmcv 2.1, mmdet 3.3 and mmseg 1.2 running on today's PyTorch and NumPy."""

import mmcv  # noqa: F401  (the stand-in hangs itself onto this package)

from mm_plugins.compat.checkpoint import register_loader
from mm_plugins.compat.cpu_launch import repair_cpu_launch
from mm_plugins.compat.ops_table import PORTABLE_OPS, op_backends
from mm_plugins.compat.panoptic_standin import install_panopticapi
from mm_plugins.compat.standin import install
from mm_plugins.compat.upstream import repair_upstream

STANDIN_SERVES: bool = install(PORTABLE_OPS)
"""True when the stand-in answers for ``mmcv._ext``; False when a compiled mmcv does."""

install_panopticapi()
register_loader()
repair_cpu_launch()
repair_upstream(torchvision_imports="torchvision" in op_backends().values())

__all__ = ["PORTABLE_OPS", "STANDIN_SERVES", "op_backends"]
