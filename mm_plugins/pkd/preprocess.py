"""From the student's normalised images to the teacher's, and which positions of a feature map show an
image."""

# Shapes: N images, C colour channels, H x W pixels, h x w positions of a feature map.

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Size = tuple[int, int]
"""Height and width."""


@dataclass(frozen=True, kw_only=True)
class InputFormat:
    """How a data preprocessor turns a loaded image into network input.

    Attributes:
        mean: Subtracted per channel, after a swap of channels; 1 or 3 values.
        std: Divides per channel.
        swap_channels: Whether BGR is turned into RGB (or the reverse) first.
        pad_value: Value of padded pixels, set after normalisation.
        pad_size_divisor: Padded height and width are multiples of this.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    swap_channels: bool = False
    pad_value: float = 0.0
    pad_size_divisor: int = 1

    def same_pixels(self, other: "InputFormat") -> bool:
        """Whether both give the same numbers for the same image."""
        return (self.mean, self.std, self.swap_channels, self.pad_value) == (
            other.mean,
            other.std,
            other.swap_channels,
            other.pad_value,
        )


def remap_images(
    images_NCHW: Tensor, source: InputFormat, target: InputFormat, image_sizes: Sequence[Size]
) -> Tensor:
    """Images as the teacher's own preprocessor would give them.

    ``x_T = (swap(x_S * std_S + mean_S) - mean_T) / std_T`` on the image, the teacher's pad value beyond it:
    padding is added after normalisation, so mapped padding would be a grey border that the teacher never saw.

    Args:
        images_NCHW: Batch in the source format, padded at the right and below.
        source: Format of the batch.
        target: Format wanted.
        image_sizes: (H, W) of each image without padding.

    Returns:
        The batch itself if the formats agree, else a new tensor of the same shape and dtype.

    Raises:
        ValueError: If the padded size is no multiple of the target's ``pad_size_divisor``.
    """
    height, width = images_NCHW.shape[2:]
    divisor = target.pad_size_divisor
    if height % divisor or width % divisor:
        raise ValueError(
            f"the teacher needs inputs whose sides are multiples of {divisor}; got {height} x {width}. "
            f"Set model.data_preprocessor.pad_size_divisor={divisor} in the student's config."
        )
    if source.same_pixels(target):
        return images_NCHW
    mean_S, std_S, mean_T, std_T = (
        images_NCHW.new_tensor(values).view(-1, 1, 1)
        for values in (source.mean, source.std, target.mean, target.std)
    )
    raw_NCHW = images_NCHW * std_S + mean_S
    if source.swap_channels != target.swap_channels:
        raw_NCHW = raw_NCHW.flip(1)
    mapped_NCHW = (raw_NCHW - mean_T) / std_T
    for image_CHW, (image_height, image_width) in zip(mapped_NCHW, image_sizes, strict=True):
        image_CHW[:, image_height:] = target.pad_value
        image_CHW[:, :, image_width:] = target.pad_value
    return mapped_NCHW


def valid_positions(
    image_sizes: Sequence[Size], input_size: Size, feature_size: Size, *, device: torch.device | None = None
) -> Tensor:
    """Mask of the feature positions whose centre lies on the image and not on its padding.

    Position i of h covers input rows ``i H/h .. (i+1) H/h``; its centre is ``(i + 1/2) H/h``.

    Args:
        image_sizes: (H, W) of each image without padding.
        input_size: Padded (H, W) of the batch.
        feature_size: (h, w) of the map.
        device: Where the mask shall live.

    Returns:
        Boolean mask N1hw.
    """
    rows, columns = (
        (torch.arange(cells, device=device) + 0.5) * (pixels / cells)
        for pixels, cells in zip(input_size, feature_size, strict=True)
    )
    heights, widths = (torch.tensor(side, device=device) for side in zip(*image_sizes, strict=True))
    return ((rows < heights[:, None])[:, :, None] & (columns < widths[:, None])[:, None, :])[:, None]
