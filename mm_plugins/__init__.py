"""OpenMMLab side: ``custom_imports = dict(imports=["mm_plugins"], allow_failed_imports=False)`` in a config.

Importing it repairs the host (``compat``) and registers every room. A host that is not installed is named,
with the extra that brings it.
"""

try:
    import mmdet  # noqa: F401
    import mmengine  # noqa: F401
    import mmseg  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f"mm_plugins needs {error.name!r}, which is not installed. Install the extra: "
        'pip install "mmhf-plugins[mm]"; `mmhf doctor` shows what else is missing.'
    ) from error

from mm_plugins import compat, lau, pkd, spatialflow

__all__ = ["compat", "lau", "pkd", "spatialflow"]
