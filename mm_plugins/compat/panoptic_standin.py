"""Stand-in for ``panopticapi``, which is on no package index, so that mmdet's panoptic models load and test.

mmdet 3.3 asks it for the two conversions between ids and colours, the id of void, and the class that sums
counts. Where panopticapi is installed, it serves.
"""

import importlib.machinery
import importlib.util
import sys
import types
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

NAME = "panopticapi"
VOID = 0
OFFSET = 256**3
# Modules of mmdet that take names from panopticapi at import, or None where it is missing.
TAKERS = (
    "mmdet.evaluation.functional.panoptic_utils",
    "mmdet.evaluation.metrics.coco_panoptic_metric",
    "mmdet.apis.det_inferencer",
)


def rgb2id(color: Any) -> Any:
    """Segment id of a colour, or ids (H, W) of a picture (H, W, 3): ``R + 256 G + 65536 B``."""
    channels = np.asarray(color).astype(np.int64)
    ids = channels[..., 0] + 256 * channels[..., 1] + OFFSET // 256 * channels[..., 2]
    return ids.astype(np.int32) if ids.ndim else int(ids)


def id2rgb(id_map: Any) -> Any:
    """Colour [R, G, B] of a segment id, or the picture (H, W, 3), uint8, of ids (H, W)."""
    ids = np.asarray(id_map).astype(np.int64)
    rgb = np.stack([ids % 256, ids // 256 % 256, ids // 256**2 % 256], axis=-1)
    return rgb.astype(np.uint8) if ids.ndim else rgb.tolist()


@dataclass
class PQStatCat:
    """Counts of one category."""

    iou: float = 0.0
    tp: int = 0
    fp: int = 0
    fn: int = 0

    def __iadd__(self, other: "PQStatCat") -> "PQStatCat":
        for name in ("iou", "tp", "fp", "fn"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self


class PQStat:
    """Counts by category, added up, and their averages."""

    def __init__(self) -> None:
        self.pq_per_cat: dict[int, PQStatCat] = defaultdict(PQStatCat)

    def __getitem__(self, category: int) -> PQStatCat:
        return self.pq_per_cat[category]

    def __iadd__(self, other: "PQStat") -> "PQStat":
        for category, counts in other.pq_per_cat.items():
            self.pq_per_cat[category] += counts
        return self

    def pq_average(self, categories: dict[int, dict], isthing: bool | None) -> tuple[dict, dict]:
        """Means over the categories that occur, and the values of each; a group without any is NaN."""
        each: dict[int, dict[str, float]] = {}
        seen: list[int] = []
        for category, info in categories.items():
            if isthing is not None and (info["isthing"] == 1) != isthing:
                continue
            counts = self.pq_per_cat[category]
            size = counts.tp + 0.5 * counts.fp + 0.5 * counts.fn
            each[category] = {"pq": 0.0, "sq": 0.0, "rq": 0.0}
            if size:
                seen.append(category)
                sq = counts.iou / counts.tp if counts.tp else 0
                each[category] = {"pq": counts.iou / size, "sq": sq, "rq": counts.tp / size}
        mean = {
            key: sum(each[c][key] for c in seen) / len(seen) if seen else float("nan")
            for key in ("pq", "sq", "rq")
        }
        return {**mean, "n": len(seen)}, each


def _module(name: str, **content: Any) -> types.ModuleType:
    module = types.ModuleType(name, __doc__)
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, origin=__name__)
    module.__dict__.update(content)
    return module


def install_panopticapi() -> bool:
    """Put the stand-in into ``sys.modules`` and into what mmdet has loaded; True if it serves, idempotent."""
    loaded = sys.modules.get(NAME)
    if loaded is not None:
        return getattr(loaded.__spec__, "origin", None) == __name__
    if importlib.util.find_spec(NAME) is not None:
        return False
    utils = _module(f"{NAME}.utils", rgb2id=rgb2id, id2rgb=id2rgb)
    evaluation = _module(f"{NAME}.evaluation", VOID=VOID, OFFSET=OFFSET, PQStat=PQStat, PQStatCat=PQStatCat)
    package = _module(NAME, utils=utils, evaluation=evaluation, __path__=[])
    sys.modules |= {NAME: package, f"{NAME}.utils": utils, f"{NAME}.evaluation": evaluation}
    names = {**vars(utils), **vars(evaluation), NAME: package}
    for taker in TAKERS:
        module = sys.modules.get(taker)
        for name in (NAME, "rgb2id", "id2rgb", "VOID", "PQStat") if module else ():
            if vars(module).get(name, False) is None:
                setattr(module, name, names[name])
    return True
