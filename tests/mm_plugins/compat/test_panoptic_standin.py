"""panopticapi's names: by hand, and installed where mmdet looks for them."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mm_plugins.compat.panoptic_standin import PQStat, id2rgb, install_panopticapi, rgb2id

ROOT = Path(__file__).resolve().parents[3]


def test_ids_and_colours() -> None:
    assert rgb2id([1, 2, 3]) == 1 + 2 * 256 + 3 * 65536
    assert id2rgb(197121) == [1, 2, 3]
    ids = np.random.default_rng(0).integers(0, 2**24, size=(5, 7))
    assert id2rgb(ids).dtype == np.uint8
    assert np.array_equal(rgb2id(id2rgb(ids)), ids)


def test_averages_by_hand() -> None:
    """Class 1: 2 matches of IoU sum 1.5, one false positive, one miss: PQ 1.5/3; class 2: a miss, PQ 0;
    class 3 does not occur."""
    stat = PQStat()
    one = PQStat()
    one[1].tp, one[1].iou, one[1].fp = 2, 1.5, 1
    two = PQStat()
    two[1].fn, two[2].fn = 1, 1
    stat += one
    stat += two
    categories = {1: {"isthing": 1}, 2: {"isthing": 1}, 3: {"isthing": 0}}
    mean, each = stat.pq_average(categories, isthing=None)
    assert each[1] == {"pq": 0.5, "sq": 0.75, "rq": 2 / 3}
    assert mean == {"pq": 0.25, "sq": 0.375, "rq": 1 / 3, "n": 2}
    nothing, _ = stat.pq_average(categories, isthing=False)
    assert math.isnan(nothing["pq"])
    assert nothing["n"] == 0


@pytest.mark.parametrize("first", ["mm_plugins", "mmdet.evaluation.metrics.coco_panoptic_metric"])
def test_mmdet_finds_it_in_any_order_of_imports(first: str) -> None:
    """mmdet binds None at import where panopticapi is missing; that is filled in."""
    # mmdet alone needs mmcv._ext before its models import: the stand-in for it goes first.
    code = (
        "import mmcv, mm_plugins.compat.standin as s; from mm_plugins.compat.ops_table import PORTABLE_OPS; "
        f"import {first}, mm_plugins; "
        "from mmdet.evaluation.metrics import coco_panoptic_metric as m; "
        "from mmdet.evaluation.functional import panoptic_utils as u; "
        "from mmdet.datasets.transforms import LoadPanopticAnnotations; LoadPanopticAnnotations(); "
        "assert m.PQStat and m.panopticapi and u.rgb2id and m.VOID == 0; print('found')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip().endswith("found"), done.stderr[-2000:]


def test_names_that_mmdet_has_not_got_are_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmdet.evaluation.functional import panoptic_utils

    served = sys.modules["panopticapi"]
    monkeypatch.delitem(sys.modules, "panopticapi")
    monkeypatch.setattr(panoptic_utils, "PQStat", None)
    assert install_panopticapi()
    assert panoptic_utils.PQStat is PQStat
    sys.modules["panopticapi"] = served


def test_a_real_panopticapi_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    real = types.ModuleType("panopticapi")
    monkeypatch.setitem(sys.modules, "panopticapi", real)
    assert install_panopticapi() is False
    assert sys.modules["panopticapi"] is real
