"""COCO-panoptic and Cityscapes annotations as data sets of mmdet, numbered things first and checked early."""

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from mmdet.datasets import CocoPanopticDataset
from mmdet.datasets.api_wrappers import COCOPanoptic
from mmdet.registry import DATASETS

from mm_plugins.spatialflow.annotations import check_annotations, check_things_first, match_names


class _ByName(COCOPanoptic):
    """mmdet's reader of panoptic JSON, which answers category ids in the order of the names asked for."""

    def createIndex(self) -> None:  # noqa: N802  (pycocotools' name)
        """Check the JSON, then index it."""
        check_annotations(self.dataset, "the panoptic JSON")
        for annotation in self.dataset["annotations"]:
            for segment in annotation["segments_info"]:
                segment.setdefault("iscrowd", 0)
        super().createIndex()
        self.png_names = {a["image_id"]: a.get("file_name") for a in self.dataset["annotations"]}

    def get_cat_ids(
        self, cat_names: Sequence[str] = (), sup_names: Sequence[str] = (), cat_ids: Sequence[int] = ()
    ) -> list:
        """Ids of the named categories, in the order of the names."""
        if sup_names or cat_ids:
            return super().get_cat_ids(cat_names, sup_names, cat_ids)
        return match_names(cat_names, self.dataset["categories"], "the panoptic JSON")


@DATASETS.register_module()
class PanopticDataset(CocoPanopticDataset):
    """COCO panoptic annotations of any classes in any order.

    Takes the arguments of mmdet's CocoPanopticDataset. Labels follow ``metainfo['classes']`` by name, not the
    order of the JSON, and things must come first there. The PNG of an image is the annotation's own
    ``file_name``.

    Raises:
        ValueError: If JSON and classes disagree, things do not come first, or the JSON is faulty.
    """

    COCOAPI = _ByName

    def load_data_list(self) -> list[dict]:
        """Read the JSON, check the order of the classes, and number them."""
        data = super().load_data_list()
        # What the metric reads: that labels follow the names whatever the order of the JSON.
        self._metainfo["labels_follow_classes"] = True
        return data

    def parse_data_info(self, raw_data_info: dict) -> dict:
        """One image, with its PNG named as the annotation names it."""
        if not hasattr(self, "_things_checked"):
            by_id = {category["id"]: category["isthing"] for category in self.coco.dataset["categories"]}
            check_things_first(
                self.metainfo["classes"], [by_id[i] for i in self.cat_ids], "metainfo['classes']"
            )
            self._things_checked = True
        raw_data_info["raw_ann_info"] = [
            segment for segment in raw_data_info["raw_ann_info"] if segment["category_id"] in self.cat2label
        ]
        data = super().parse_data_info(raw_data_info)
        png = self.coco.png_names.get(data["img_id"])
        if data["seg_map_path"] is not None and png is not None:
            data["seg_map_path"] = str(PurePosixPath(self.data_prefix["seg"]) / png)
        return data


@DATASETS.register_module()
class CityscapesPanopticDataset(PanopticDataset):
    """Cityscapes panoptic annotations as cityscapesscripts writes them, eight thing classes first.

    ``data_prefix=dict(img='leftImg8bit/train/', seg='gtFine/cityscapes_panoptic_train/')``.
    """

    METAINFO = {
        "classes": (
            "person",
            "rider",
            "car",
            "truck",
            "bus",
            "train",
            "motorcycle",
            "bicycle",
            "road",
            "sidewalk",
            "building",
            "wall",
            "fence",
            "pole",
            "traffic light",
            "traffic sign",
            "vegetation",
            "terrain",
            "sky",
        ),
        "thing_classes": ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
        "stuff_classes": (
            "road",
            "sidewalk",
            "building",
            "wall",
            "fence",
            "pole",
            "traffic light",
            "traffic sign",
            "vegetation",
            "terrain",
            "sky",
        ),
        "palette": [
            (220, 20, 60),
            (255, 0, 0),
            (0, 0, 142),
            (0, 0, 70),
            (0, 60, 100),
            (0, 80, 100),
            (0, 0, 230),
            (119, 11, 32),
            (128, 64, 128),
            (244, 35, 232),
            (70, 70, 70),
            (102, 102, 156),
            (190, 153, 153),
            (153, 153, 153),
            (250, 170, 30),
            (220, 220, 0),
            (107, 142, 35),
            (152, 251, 152),
            (70, 130, 180),
        ],
    }

    def parse_data_info(self, raw_data_info: dict) -> dict:
        """One image; its file lies in a folder named after the city, as the image id begins."""
        data: dict[str, Any] = super().parse_data_info(raw_data_info)
        image_id = str(data["img_id"])
        name = f"{image_id}_leftImg8bit.png"
        data["img_path"] = str(PurePosixPath(self.data_prefix["img"]) / image_id.split("_")[0] / name)
        return data
