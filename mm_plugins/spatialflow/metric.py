"""Panoptic quality as a metric of mmdet's evaluator, without panopticapi and without temporary files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
from mmdet.registry import METRICS
from mmengine.evaluator import BaseMetric
from mmengine.fileio import get, load
from mmengine.logging import print_log
from terminaltables import AsciiTable

from mm_plugins.spatialflow.annotations import (
    check_annotations,
    check_picture,
    check_things_first,
    match_names,
)
from mm_plugins.spatialflow.quality import (
    ImageCounts,
    Quality,
    count_image,
    mean_of_seen,
    panoptic_quality,
)
from mm_plugins.spatialflow.segment_ids import INSTANCE_OFFSET, decode_png, predicted_segments

GROUPS = {"": "all", "_th": "things", "_st": "stuff"}


@METRICS.register_module()
class PanopticQuality(BaseMetric):
    """PQ, SQ and RQ of any panoptic model of mmdet: ``val_evaluator=dict(type="PanopticQuality", ...)``.

    Numbers are those of panopticapi to the last digit; names in the log are those of CocoPanopticMetric
    (``coco_panoptic/PQ`` ... ``RQ_st``). Classes are matched by name; a group of classes of which none
    occurs is NaN. Each image is counted as it comes, each process of several counts its share.

    Args:
        ann_file: COCO panoptic JSON; without it, ``segments_info`` and ``seg_map_path`` must be among
            PackDetInputs' meta_keys.
        seg_prefix: Folder of its PNGs.
        classwise: Print the table of all classes.
        backend_args: How files are read (mmengine's file backends).
        collect_device: ``cpu`` or ``gpu``: where results of several processes meet.
        prefix: Put before the metric's names in the log.

    Raises:
        ValueError: If classes and JSON disagree, things do not come first, or JSON and PNG disagree.
    """

    default_prefix = "coco_panoptic"

    def __init__(
        self,
        ann_file: str | None = None,
        seg_prefix: str | None = None,
        classwise: bool = True,
        backend_args: Mapping[str, Any] | None = None,
        collect_device: str = "cpu",
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        if (ann_file is None) != (seg_prefix is None):
            raise ValueError(
                f"ann_file and seg_prefix belong together: the JSON and the folder of its PNGs; got "
                f"ann_file={ann_file!r}, seg_prefix={seg_prefix!r}. Give both, or neither."
            )
        self.ann_file, self.seg_prefix, self.classwise = ann_file, seg_prefix, classwise
        self.backend_args = backend_args
        self.annotations: dict[Any, dict] = {}
        self.label_of: dict[Any, int] = {}
        self.num_things = 0

    @property
    def dataset_meta(self) -> dict | None:
        """Meta information of the data set; setting it, before the first image, checks the annotation."""
        return self._dataset_meta

    @dataset_meta.setter
    def dataset_meta(self, meta: dict) -> None:
        """Take the classes of the data set and check them against the annotation."""
        self._dataset_meta = meta
        classes = list(meta["classes"])
        if len(classes) >= INSTANCE_OFFSET:
            raise ValueError(
                f"{len(classes)} classes; mmdet's panoptic maps hold label + {INSTANCE_OFFSET} * instance, "
                f"so there can be {INSTANCE_OFFSET - 1} at most."
            )
        if self.ann_file is None:
            if "thing_classes" not in meta:
                raise ValueError(
                    "metainfo has no thing_classes, so things and stuff cannot be told apart. Give "
                    "metainfo=dict(classes=..., thing_classes=..., stuff_classes=...), or ann_file and "
                    "seg_prefix."
                )
            things = [name in set(meta["thing_classes"]) for name in classes]
            self.num_things = check_things_first(classes, things, "metainfo['classes']")
            return
        content = load(self.ann_file, backend_args=self.backend_args)
        check_annotations(content, self.ann_file)
        ids = match_names(classes, content["categories"], self.ann_file)
        self.label_of = {category: label for label, category in enumerate(ids)}
        isthing = {category["id"]: bool(category["isthing"]) for category in content["categories"]}
        in_json = [c["id"] for c in content["categories"] if c["id"] in self.label_of]
        things = [isthing[category] for category in ids]
        self.num_things = check_things_first(classes, things, "metainfo['classes']")
        if in_json != ids and not meta.get("labels_follow_classes"):
            raise ValueError(
                f"{self.ann_file} lists its categories in another order than metainfo['classes'], and "
                "CocoPanopticDataset numbers labels as the JSON does. Use dataset.type='PanopticDataset', "
                "which goes by name."
            )
        self.annotations = {annotation["image_id"]: annotation for annotation in content["annotations"]}

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Count one batch; called by the evaluator."""
        num_classes = len(self._dataset_meta["classes"])
        for sample in data_samples:
            ids, segments, labels = self._annotation(sample)
            check_picture(ids, segments, f"image {sample.get('img_id')!r}")
            panoptic = sample["pred_panoptic_seg"]["sem_seg"].cpu().numpy()[0]
            pred_ids, pred_labels = predicted_segments(panoptic, num_classes)
            self.results.append(
                count_image(
                    ids,
                    [segment["id"] for segment in segments],
                    labels,
                    [bool(segment.get("iscrowd", 0)) for segment in segments],
                    panoptic,
                    pred_ids.tolist(),
                    pred_labels.tolist(),
                )
            )

    def _annotation(self, sample: dict) -> tuple[np.ndarray, list[dict], list[int]]:
        """Ids, segments and their labels of one image."""
        if self.ann_file is None:
            if "segments_info" not in sample or "seg_map_path" not in sample:
                raise ValueError(
                    "no annotation comes with the image. Give the metric ann_file and seg_prefix, or add "
                    "'segments_info' and 'seg_map_path' to meta_keys of PackDetInputs in test_pipeline."
                )
            # mmdet marks crowd regions by taking is_thing from a thing.
            segments = [
                {**s, "iscrowd": int(s["category"] < self.num_things and not s["is_thing"])}
                for s in sample["segments_info"]
            ]
            labels = [segment["category"] for segment in segments]
            return self._read(sample["seg_map_path"]), segments, labels
        assert self.seg_prefix is not None, "ann_file comes with seg_prefix"
        annotation = self.annotations.get(sample["img_id"])
        if annotation is None:
            raise ValueError(
                f"{self.ann_file} has no annotation of image {sample['img_id']!r}. Is it the JSON of another "
                "split? The evaluator and test_dataloader need the same ann_file."
            )
        ids = self._read(str(Path(self.seg_prefix) / annotation["file_name"]))
        listed = annotation["segments_info"]
        # Segments of classes that the data set leaves out are void.
        left_out = [s["id"] for s in listed if s["category_id"] not in self.label_of]
        ids[np.isin(ids, left_out)] = 0
        segments = [s for s in listed if s["category_id"] in self.label_of]
        return ids, segments, [self.label_of[s["category_id"]] for s in segments]

    def _read(self, path: str) -> np.ndarray:
        picture = mmcv.imfrombytes(
            get(path, backend_args=self.backend_args), flag="color", channel_order="rgb"
        )
        return decode_png(picture)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """PQ, SQ and RQ in per cent, of all classes, things and stuff; the tables go to the log."""
        classes = list(self._dataset_meta["classes"])
        # On its way here mmengine makes plain tuples of named ones.
        quality = panoptic_quality((ImageCounts(*counts) for counts in results), len(classes))
        groups = {
            "": range(len(classes)),
            "_th": range(self.num_things),
            "_st": range(self.num_things, len(classes)),
        }
        metrics: dict[str, float] = {}
        rows = [["", "PQ", "SQ", "RQ", "classes"]]
        for suffix, chosen in groups.items():
            cells = [GROUPS[suffix]]
            for name, values in (("PQ", quality.pq_C), ("SQ", quality.sq_C), ("RQ", quality.rq_C)):
                mean, seen = mean_of_seen(values, chosen)
                metrics[name + suffix] = 100 * mean
                cells.append(f"{100 * mean:.3f}")
            rows.append([*cells, str(seen)])
        print_log("Panoptic quality:\n" + AsciiTable(rows).table, logger="current")
        if self.classwise:
            print_log("Panoptic quality of each class:\n" + _class_table(quality, classes), logger="current")
        return metrics


def _class_table(quality: Quality, classes: Sequence[str]) -> str:
    rows = [["class", "PQ", "SQ", "RQ", "TP", "FP", "FN"]]
    for label, name in enumerate(classes):
        if not np.isnan(quality.pq_C[label]):
            shares = [quality.pq_C[label], quality.sq_C[label], quality.rq_C[label]]
            counts = [quality.tp_C[label], quality.fp_C[label], quality.fn_C[label]]
            rows.append([name, *(f"{100 * share:.2f}" for share in shares), *map(str, counts)])
    absent = len(classes) - len(rows) + 1
    note = f"\n{absent} classes neither occur nor were predicted." if absent else ""
    return AsciiTable(rows).table + note
