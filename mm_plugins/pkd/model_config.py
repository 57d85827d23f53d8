"""What the config of a detector says about its feature pyramid and its input, read from plain dicts."""

from collections.abc import Mapping
from typing import Any

from mm_plugins.pkd.preprocess import InputFormat


def is_two_stage(model: Mapping[str, Any]) -> bool:
    """Whether a detector's config has a second stage."""
    return model.get("roi_head") is not None


def level_channels(model: Mapping[str, Any]) -> int | tuple[int, ...] | None:
    """Channels of the maps that a detector's neck gives: one number for all, one per level, or None if
    unknown."""
    neck = model.get("neck")
    parts = [neck] if isinstance(neck, Mapping) else list(neck or [])
    for part in reversed(parts):
        channels = part.get("out_channels")
        if channels is not None:
            return channels if isinstance(channels, int) else tuple(channels)
    return None


def num_levels(model: Mapping[str, Any]) -> int | None:
    """How many maps a detector's neck gives, where its config says so."""
    neck = model.get("neck")
    return neck.get("num_outs") if isinstance(neck, Mapping) else None


def input_format(model: Mapping[str, Any]) -> InputFormat:
    """What a detector's ``data_preprocessor`` makes of an image."""
    cfg = model.get("data_preprocessor") or {}
    mean, std = cfg.get("mean"), cfg.get("std")
    return InputFormat(
        mean=(0.0,) if mean is None else tuple(float(value) for value in mean),
        std=(1.0,) if std is None else tuple(float(value) for value in std),
        swap_channels=bool(cfg.get("bgr_to_rgb") or cfg.get("rgb_to_bgr")),
        pad_value=float(cfg.get("pad_value", 0)),
        pad_size_divisor=int(cfg.get("pad_size_divisor", 1)),
    )
