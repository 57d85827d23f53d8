"""``mmhf spatialflow picture | check | mend | convert``: see what a model segments, and prepare data and
weights."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
from mmdet.apis import inference_detector, init_detector
from mmdet.registry import MODELS
from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import CheckpointLoader

import mm_plugins  # noqa: F401  (registers the rooms)
from mm_plugins.spatialflow.annotations import check_annotations, check_picture, mend_segments
from mm_plugins.spatialflow.checkpoint_names import THINGS_CHANNEL, convert_release
from mm_plugins.spatialflow.picture import labels, overlay
from mm_plugins.spatialflow.segment_ids import decode_png, predicted_segments


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Words after the program's name; those of the process by default.

    Returns:
        0 if all is well, 2 if the command could not run.
    """
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, TypeError, OSError, RuntimeError, KeyError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmhf spatialflow", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    picture = commands.add_parser("picture", help="draw the panoptic prediction of one image")
    picture.add_argument("config", help="config of any panoptic model of mmdet")
    picture.add_argument("checkpoint", help="its weights")
    picture.add_argument("image", help="image file")
    picture.add_argument("out", type=Path, help="picture to write (.png or .jpg)")
    picture.add_argument("--device", default="cpu", help="cpu, or cuda:0")
    picture.add_argument("--strength", type=float, default=0.55, help="share of the colour, in [0, 1]")
    picture.add_argument("--no-labels", action="store_true", help="write no names")
    picture.add_argument("--cfg-options", nargs="+", action=DictAction, help="KEY=VALUE, as in mmdet's tools")
    picture.set_defaults(run=_picture)
    check = commands.add_parser("check", help="look for faults in a panoptic JSON and its PNGs")
    mend = commands.add_parser("mend", help="write a JSON with areas and boxes as the PNGs have them")
    for command, run in ((check, _check), (mend, _mend)):
        command.add_argument("json", type=Path, help="COCO panoptic JSON")
        command.add_argument("pngs", type=Path, help="folder of its PNGs")
        command.set_defaults(run=run)
    mend.add_argument("out", type=Path, help="JSON to write")
    convert = commands.add_parser(
        "convert", help="turn a checkpoint of the authors' release into one of this suite"
    )
    convert.add_argument("checkpoint", help="checkpoint of chensnathan/SpatialFlow")
    convert.add_argument("out", type=Path, help="checkpoint to write")
    convert.add_argument(
        "--config", help="config of this suite; names and shapes are checked against its model"
    )
    convert.add_argument(
        "--things-channel",
        type=int,
        default=THINGS_CHANNEL,
        help="the release's channel of things; 36 for COCO",
    )
    convert.set_defaults(run=_convert)
    return parser


def _picture(args: argparse.Namespace) -> int:
    config = Config.fromfile(args.config)
    config.merge_from_dict(args.cfg_options or {})
    image = mmcv.imread(args.image)
    if image is None:
        raise ValueError(f"{args.image} is no image that can be read. Give a .jpg or .png file.")
    if not 0 <= args.strength <= 1:
        raise ValueError(f"--strength must lie in [0, 1]; got {args.strength}. It is a share: 0.55 for 55 %.")
    model = init_detector(config, args.checkpoint, device=args.device)
    result = inference_detector(model, image)
    if "pred_panoptic_seg" not in result:
        raise ValueError(
            f"{args.config} is no panoptic model: it predicts {sorted(result.keys())}. Use a config of "
            "configs/spatialflow, or of mmdet's panoptic models."
        )
    panoptic = result.pred_panoptic_seg.sem_seg[0].cpu().numpy()
    classes = list(model.dataset_meta["classes"])
    palette = [tuple(colour[::-1]) for colour in model.dataset_meta["palette"]]
    drawn = overlay(image, panoptic, palette, strength=args.strength)
    for text, row, column in [] if args.no_labels else labels(panoptic, classes, min_area=200):
        size = max(0.35, min(image.shape[:2]) / 1200)
        place = (max(column - int(10 * size * len(text)), 0), row + int(10 * size))
        # Dark below, light above: readable on any colour.
        cv2.putText(drawn, text, place, cv2.FONT_HERSHEY_SIMPLEX, size, (0, 0, 0), 3, cv2.LINE_AA)
        cv2.putText(drawn, text, place, cv2.FONT_HERSHEY_SIMPLEX, size, (255, 255, 255), 1, cv2.LINE_AA)
    _write(args.out, lambda path: mmcv.imwrite(drawn, str(path)))
    counts: dict[str, int] = {}
    for label in predicted_segments(panoptic, len(classes))[1].tolist():
        counts[classes[label]] = counts.get(classes[label], 0) + 1
    void = 100 * (panoptic % 1000 >= len(classes)).mean()
    found = ", ".join(f"{count} {name}" for name, count in counts.items()) or "no segment"
    print(f"{args.out}: {found}; {void:.1f} % of the pixels are void")
    return 0


def _pictures(content: dict, folder: Path) -> Any:
    """Annotation, decoded PNG and name of each image, with a line of progress now and then."""
    total = len(content["annotations"])
    for i, annotation in enumerate(content["annotations"]):
        path = folder / annotation["file_name"]
        picture = cv2.imread(str(path), cv2.IMREAD_COLOR) if path.is_file() else None
        if picture is None:
            raise FileNotFoundError(
                f"{path} is missing or no picture. Give the folder that holds the PNGs named in the JSON."
            )
        yield (
            annotation,
            decode_png(np.ascontiguousarray(picture[..., ::-1])),
            f"image {annotation['image_id']!r}",
        )
        if (i + 1) % 500 == 0:
            print(f"{i + 1} of {total} images", file=sys.stderr)


def _check(args: argparse.Namespace) -> int:
    content = _read(args.json)
    check_annotations(content, str(args.json))
    segments = 0
    for annotation, ids, name in _pictures(content, args.pngs):
        check_picture(ids, annotation["segments_info"], name)
        segments += len(annotation["segments_info"])
    print(f"{args.json}: {len(content['annotations'])} images, {segments} segments, no fault")
    return 0


def _mend(args: argparse.Namespace) -> int:
    content = _read(args.json)
    changed = 0
    for annotation, ids, name in _pictures(content, args.pngs):
        mended = mend_segments(ids, annotation["segments_info"], name)
        changed += mended != annotation["segments_info"]
        annotation["segments_info"] = mended
    check_annotations(content, str(args.json))
    _write(args.out, lambda path: path.write_text(json.dumps(content), encoding="utf-8"))
    print(f"{args.out}: {changed} of {len(content['annotations'])} images changed")
    return 0


def _convert(args: argparse.Namespace) -> int:
    loaded = CheckpointLoader.load_checkpoint(args.checkpoint, map_location="cpu", logger=None)
    weights = convert_release(loaded.get("state_dict", loaded), things_channel=args.things_channel)
    if args.config:
        config = Config.fromfile(args.config)
        init_default_scope(config.get("default_scope", "mmdet"))
        config.model.backbone.init_cfg = None
        wanted = MODELS.build(config.model).state_dict()
        wrong = sorted(set(weights) ^ set(wanted))
        wrong += [name for name in weights if name in wanted and weights[name].shape != wanted[name].shape]
        if wrong:
            raise ValueError(
                f"the checkpoint is not of the model of {args.config}: {len(wrong)} names or shapes "
                f"differ, first {wrong[0]!r}. Give the config of the same backbone and variant."
            )
    _write(args.out, lambda path: torch.save({"state_dict": weights, "meta": {}}, path))
    print(f"{args.out}: {len(weights)} entries")
    return 0


def _read(path: Path) -> dict:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or "annotations" not in content:
        raise ValueError(
            f"{path} is no COCO panoptic JSON: it has no annotations. Give the panoptic_*.json file."
        )
    return content


def _write(out: Path, write: Callable[[Path], Any]) -> None:
    """Written aside and renamed, so that a reader never sees half a file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".part-{out.name}")
    try:
        write(aside)
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)


if __name__ == "__main__":
    raise SystemExit(main())
