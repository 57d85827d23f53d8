"""``python -m mm_plugins.lau picture CONFIG CHECKPOINT IMAGE OUT``: prediction and offsets of one image."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import mmcv
import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config, DictAction
from mmseg.apis import inference_model, init_model
from torch import Tensor, nn

import mm_plugins  # noqa: F401  (registers the rooms)
from mm_plugins.lau.offset_picture import arrow_points, colour_wheel, wheel_colours
from mm_plugins.lau.upsample import LaUUpsample

GAP = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Words after the program's name; those of the process by default.

    Returns:
        0 if all is well, 2 if the command could not run.
    """
    parser = argparse.ArgumentParser(prog="python -m mm_plugins.lau", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    picture = commands.add_parser("picture", help="draw the prediction and the offsets of one image")
    picture.add_argument("config", help="config of a model with LaU")
    picture.add_argument("checkpoint", help="its weights")
    picture.add_argument("image", help="image file")
    picture.add_argument("out", type=Path, help="picture to write (.png or .jpg)")
    picture.add_argument("--device", default="cpu", help="cpu, or cuda:0")
    picture.add_argument("--step", type=int, default=12, help="pixels between two arrows")
    picture.add_argument("--cfg-options", nargs="+", action=DictAction, help="KEY=VALUE, as in mmseg's tools")
    args = parser.parse_args(argv)
    try:
        return _picture(args)
    except (ValueError, TypeError, OSError, RuntimeError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _picture(args: argparse.Namespace) -> int:
    config = Config.fromfile(args.config)
    config.merge_from_dict(args.cfg_options or {})
    image = mmcv.imread(args.image)
    if image is None:
        raise ValueError(f"{args.image} is no image that can be read.")
    model = init_model(config, args.checkpoint, device=args.device)
    layer = find_layer(model)
    kept: list[Tensor] = []
    with torch.no_grad():
        hook = layer.branch.register_forward_hook(lambda _, __, out: kept.append(out))
        with_offsets = predict(model, image)
        hook.remove()
        hook = layer.branch.register_forward_hook(lambda _, __, out: torch.zeros_like(out))
        without = predict(model, image)
        hook.remove()
    if len(kept) != 1:
        raise ValueError(
            f"the model enlarged {len(kept)} maps for one image; draw with test_cfg.mode=whole "
            "(--cfg-options model.test_cfg.mode=whole)."
        )
    offset = kept[0][0, [0, kept[0].shape[1] // 2]].float().cpu()
    palette = np.array(model.dataset_meta["palette"], dtype=np.uint8)[:, ::-1]
    cells = (offset.shape[1] / layer.scale_factor[0], offset.shape[2] / layer.scale_factor[1])
    panels = [
        image,
        _overlay(image, palette[with_offsets]),
        _changes(image, with_offsets != without),
        draw_offsets(offset, image.shape[:2], cells, args.step),
    ]
    gap = np.full((image.shape[0], GAP, 3), 255, np.uint8)
    row = [part for panel in panels for part in (panel, gap)][:-1]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    mmcv.imwrite(np.concatenate(row, axis=1), str(args.out))
    length = torch.hypot(offset[0], offset[1])
    print(
        f"{args.out}: image | prediction | pixels that the offsets change (red) | offsets. Offset length in "
        f"cells: mean {length.mean():.3f}, largest {length.max():.3f}; class changed by the offsets at "
        f"{100 * (with_offsets != without).mean():.2f} % of the pixels."
    )
    return 0


def find_layer(model: nn.Module) -> LaUUpsample:
    """The one LaU layer of a model.

    Raises:
        ValueError: If there is none, or more than one.
    """
    layers = [module for module in model.modules() if isinstance(module, LaUUpsample)]
    if len(layers) != 1:
        raise ValueError(
            f"the model holds {len(layers)} LaUUpsample layers; the picture needs one. Use a LaU head, for "
            "example type='LaUFCNHead'."
        )
    return layers[0]


def predict(model: nn.Module, image: np.ndarray) -> np.ndarray:
    """Class indices (H, W) of a BGR image."""
    return inference_model(model, image).pred_sem_seg.data[0].cpu().numpy()


def draw_offsets(offset: Tensor, size: tuple[int, int], cells: tuple[float, float], step: int) -> np.ndarray:
    """BGR picture of the offsets (2, H, W): colours, arrows to the sampled points, and the legend."""
    offset = F.interpolate(offset[None], size=size, mode="nearest")[0]
    largest = max(
        torch.hypot(offset[0], offset[1]).quantile(0.99).item() if offset[0].numel() < 2**24 else 1.0, 1e-6
    )
    canvas = np.ascontiguousarray(wheel_colours(offset[0], offset[1], largest).numpy()[..., ::-1])
    per_cell = (size[0] / cells[0], size[1] / cells[1])
    for y0, x0, y1, x1 in arrow_points(offset, step, per_cell).round().int().tolist():
        cv2.arrowedLine(canvas, (x0, y0), (x1, y1), (40, 40, 40), 1, cv2.LINE_AA, tipLength=0.3)
    side = max(16, min(size) // 6)
    canvas[-side:, -side:] = colour_wheel(side).numpy()[..., ::-1]
    cv2.putText(
        canvas, f"{largest:.2f}", (size[1] - side, size[0] - side - 3), cv2.FONT_HERSHEY_PLAIN, 0.8, (0, 0, 0)
    )
    return canvas


def _overlay(image: np.ndarray, colours: np.ndarray) -> np.ndarray:
    return (0.45 * image + 0.55 * colours).astype(np.uint8)


def _changes(image: np.ndarray, changed: np.ndarray) -> np.ndarray:
    grey = np.repeat(image.mean(-1, keepdims=True) * 0.6, 3, axis=-1)
    grey[changed] = (40, 40, 235)
    return grey.astype(np.uint8)


if __name__ == "__main__":
    raise SystemExit(main())
