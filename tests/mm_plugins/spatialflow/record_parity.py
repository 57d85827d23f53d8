"""Record panopticapi's numbers on random cases: ``python -m tests.mm_plugins.spatialflow.record_parity
FOLDER``.

FOLDER holds a checkout of cocodataset/panopticapi (BSD-2-Clause) at commit
7bb4655548f98f3fedc07bf37e9040a992b054b0. Writes ``tests/data/panoptic_pq/panopticapi.json``.
"""

import json
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np

from tests.mm_plugins.spatialflow.reference import random_images

OUT = Path(__file__).resolve().parents[2] / "data" / "panoptic_pq" / "panopticapi.json"
NUM_CASES, NUM_THINGS, NUM_CLASSES = 40, 4, 7


def _write(folder: Path, name: str, ids: np.ndarray) -> None:
    rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    cv2.imwrite(str(folder / name), rgb[..., ::-1])


def main(source: str) -> None:
    sys.path.insert(0, source)
    from panopticapi.evaluation import pq_compute_single_core

    categories = {c: {"id": c, "isthing": int(c < NUM_THINGS)} for c in range(NUM_CLASSES)}
    record = []
    for seed in range(NUM_CASES):
        with tempfile.TemporaryDirectory() as folder:
            gt_folder, pred_folder = Path(folder) / "gt", Path(folder) / "pred"
            gt_folder.mkdir()
            pred_folder.mkdir()
            pairs = []
            for i, (gt, segments, panoptic) in enumerate(random_images(seed)):
                void = panoptic % 1000 >= NUM_CLASSES
                # A stuff segment of class 0 would have id 0, which is void; there are things here.
                _write(gt_folder, f"{i}.png", gt)
                _write(pred_folder, f"{i}.png", np.where(void, 0, panoptic))
                found = [{"id": int(v), "category_id": int(v % 1000)} for v in np.unique(panoptic[~void])]
                base = {"image_id": i, "file_name": f"{i}.png"}
                pairs.append(({**base, "segments_info": segments}, {**base, "segments_info": found}))
            stat = pq_compute_single_core(0, pairs, str(gt_folder), str(pred_folder), categories)
        entry = {}
        for name, isthing in (("all", None), ("things", True), ("stuff", False)):
            try:
                mean, each = stat.pq_average(categories, isthing=isthing)
            except ZeroDivisionError:
                entry[name] = None
                continue
            entry[name] = {key: float(value) for key, value in mean.items()}
            if name == "all":
                entry["classes"] = {str(c): {k: float(v) for k, v in row.items()} for c, row in each.items()}
        entry["counts"] = {
            str(c): [int(stat[c].tp), int(stat[c].fp), int(stat[c].fn)] for c in range(NUM_CLASSES)
        }
        record.append(entry)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
