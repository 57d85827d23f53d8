"""Checks of COCO panoptic annotations (JSON and PNG), and the mending of what can be derived."""

# Shapes: H x W pixels.
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np

from mm_plugins.spatialflow.quality import count_pairs
from mm_plugins.spatialflow.segment_ids import VOID

MEND = "`mmhf spatialflow mend JSON PNG_FOLDER OUT.json` writes it anew from the PNGs"


def check_annotations(content: Mapping[str, Any], name: str) -> None:
    """Refuse a JSON that a data set or a metric would trip over later.

    Args:
        content: The parsed JSON.
        name: How messages call it.

    Raises:
        ValueError: With the first fault found, where it is, and what to do.
    """
    missing = [key for key in ("images", "annotations", "categories") if key not in content]
    if missing:
        raise ValueError(
            f"{name} has no {missing}; a COCO panoptic JSON needs images, annotations and categories. Add "
            "them: categories are dicts with id, name and isthing."
        )
    for category in content["categories"]:
        if not {"id", "name", "isthing"} <= set(category):
            raise ValueError(
                f"{name}: category {category} lacks {sorted({'id', 'name', 'isthing'} - set(category))}. "
                "Each needs id, name, and isthing (1 for countable objects, 0 for stuff)."
            )
    known = {category["id"] for category in content["categories"]}
    for annotation in content["annotations"]:
        where = f"{name}, image {annotation.get('image_id')!r}"
        if "segments_info" not in annotation or "image_id" not in annotation:
            raise ValueError(
                f"{where}: no segments_info. This may be an instance JSON; SpatialFlow needs the panoptic "
                f"one."
            )
        ids = [segment.get("id") for segment in annotation["segments_info"]]
        if len(set(ids)) < len(ids) or None in ids or VOID in ids:
            raise ValueError(
                f"{where}: segment ids must differ from one another and from {VOID}, which is void; got "
                f"{ids}. Number the segments of an image from 1, in JSON and PNG alike."
            )
        for segment in annotation["segments_info"]:
            if segment.get("category_id") not in known:
                raise ValueError(
                    f"{where}: segment {segment['id']} has category_id {segment.get('category_id')!r}, which "
                    f"categories does not list. Add it there, or correct the segment."
                )
            lacking = [key for key in ("bbox", "area") if key not in segment]
            if lacking:
                raise ValueError(
                    f"{where}: segment {segment['id']} has no {' and '.join(lacking)} in the JSON; {MEND}."
                )


def check_things_first(names: Sequence[str], things: Sequence[bool], name: str) -> int:
    """Number of thing classes, or a refusal where stuff comes before things.

    mmdet's panoptic heads take a label below the number of things for a thing, so any other order trains and
    tests wrong classes without a word.

    Args:
        names: Classes in the order of their labels.
        things: Whether each is a thing.
        name: How the message calls the list.

    Returns:
        The number of thing classes.

    Raises:
        ValueError: If a thing follows stuff; the message holds the right order.
    """
    count = sum(map(bool, things))
    if not all(things[:count]):
        order = [n for n, thing in zip(names, things, strict=True) if thing]
        order += [n for n, thing in zip(names, things, strict=True) if not thing]
        raise ValueError(
            f"{name}: things must come before stuff, but {names[list(things).index(False)]!r} (stuff) comes "
            f"before {names[len(things) - 1 - list(things)[::-1].index(True)]!r} (thing). Use "
            f"dataset.type='PanopticDataset' with metainfo=dict(classes={tuple(order)})."
        )
    return count


def match_names(wanted: Sequence[str], categories: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    """Category ids of class names, in the order of the names.

    Raises:
        ValueError: If a name is not in the categories; the nearest ones are listed.
    """
    by_name = {category["name"]: category["id"] for category in categories}
    for wanted_name in wanted:
        if wanted_name not in by_name:
            near = get_close_matches(wanted_name, by_name, n=3)
            hint = f" Did you mean {', '.join(near)}?" if near else f" It has {', '.join(by_name)}."
            raise ValueError(f"{name} has no category named {wanted_name!r}.{hint}")
    return [by_name[wanted_name] for wanted_name in wanted]


def check_picture(ids_HW: np.ndarray, segments: Sequence[Mapping[str, Any]], name: str) -> None:
    """Refuse a PNG that does not hold just the segments that its JSON lists, with their areas.

    Args:
        ids_HW: Decoded ids.
        segments: ``segments_info`` of the image.
        name: How the message calls the image.

    Raises:
        ValueError: If ids or areas disagree.
    """
    areas = _areas(ids_HW)
    listed = {segment["id"]: segment for segment in segments}
    unlisted = sorted(set(areas) - set(listed) - {VOID})
    absent = sorted(set(listed) - set(areas))
    if unlisted:
        raise ValueError(
            f"{name}: the PNG has segments {unlisted[:5]} that the JSON does not list. Add their category, "
            "or paint them 0 (void)."
        )
    if absent:
        raise ValueError(f"{name}: the JSON lists segments {absent[:5]} that the PNG does not have; {MEND}.")
    for key, segment in listed.items():
        if "area" in segment and segment["area"] != areas[key]:
            raise ValueError(
                f"{name}: segment {key} has area {segment['area']} in the JSON and {areas[key]} pixels in "
                f"the PNG. Was the PNG resized? Otherwise, {MEND}."
            )


def mend_segments(ids_HW: np.ndarray, segments: Sequence[Mapping[str, Any]], name: str) -> list[dict]:
    """Segments with area and box as the PNG has them; those without a pixel are dropped.

    Args:
        ids_HW: Decoded ids.
        segments: ``segments_info`` of the image.
        name: How the message calls the image.

    Returns:
        New ``segments_info``.

    Raises:
        ValueError: If the PNG has a segment that is not listed: its category cannot be known.
    """
    areas = _areas(ids_HW)
    kept = [dict(segment) for segment in segments if segment["id"] in areas]
    for segment in kept:
        rows, columns = np.nonzero(ids_HW == segment["id"])
        box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        segment["bbox"], segment["area"] = [int(value) for value in box], areas[segment["id"]]
        segment.setdefault("iscrowd", 0)
    check_picture(ids_HW, kept, name)
    return kept


def _areas(ids_HW: np.ndarray) -> dict[int, int]:
    pairs = count_pairs(ids_HW, np.zeros_like(ids_HW))
    return dict(zip(pairs.first_K.tolist(), pairs.pixels_K.tolist(), strict=True))
