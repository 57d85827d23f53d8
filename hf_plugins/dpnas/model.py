"""DPNASNet as a model of transformers: `from_pretrained`, Auto classes, image-classification pipeline."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    BatchFeature,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutput

from hf_plugins.dpnas.config import SHAPES
from hf_plugins.dpnas.genotypes import RELEASED, Genotype
from hf_plugins.dpnas.network import DPNASNet, initialise_


class DPNASNetConfig(PreTrainedConfig):
    """Shape of a DPNASNet.

    Args:
        genotype: The cell as 15 triples (operation, from, to); the released CIFAR-10 cell if left out.
        in_channels: Channels of the images.
        image_size: Side of the images in pixels.
        stem_channels: Channels after the stem.
        cell_channels: Channels of the cells.
        groups: Groups of every GroupNorm.
        head_activation: Activation inside the classifier.
        fifth: Activation of operation 5, ``selu`` or ``elu``.
        image_mean: Subtracted from pixels in [0, 1], a value a channel.
        image_std: Divides them.
        kwargs: As in `PreTrainedConfig`, for example ``num_labels`` or ``id2label``.

    Raises:
        ValueError: If the genotype is no cell of the space.

    Source: DPNAS, arXiv 2110.08557.
    """

    model_type = "dpnasnet"

    def __init__(
        self,
        genotype: Sequence[Sequence[int]] | None = None,
        in_channels: int = 3,
        image_size: int = 32,
        stem_channels: int = 48,
        cell_channels: Sequence[int] = (48, 96, 192),
        groups: int = 8,
        head_activation: str = "selu",
        fifth: str = "selu",
        image_mean: Sequence[float] = (0.485, 0.456, 0.406),
        image_std: Sequence[float] = (0.229, 0.224, 0.225),
        **kwargs: Any,
    ) -> None:
        cell = RELEASED["cifar10"] if genotype is None else Genotype.from_triples(genotype)
        self.genotype = cell.triples()
        self.in_channels, self.image_size = in_channels, image_size
        self.stem_channels, self.cell_channels = stem_channels, list(cell_channels)
        self.groups, self.head_activation, self.fifth = groups, head_activation, fifth
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        kwargs.setdefault("num_labels", 10)
        super().__init__(**kwargs)

    @classmethod
    def preset(cls, name: str, **kwargs: Any) -> "DPNASNetConfig":
        """The released network for ``cifar10``, ``mnist`` or ``fashion_mnist``.

        Args:
            name: Which of the three.
            kwargs: What to change, for example another ``genotype`` of the same widths.

        Raises:
            ValueError: If the name is none of the three.
        """
        if name not in RELEASED:
            raise ValueError(f"no released DPNASNet is called {name!r}; there are {', '.join(RELEASED)}.")
        shape = {**SHAPES[name], "genotype": RELEASED[name].triples()}
        if shape["in_channels"] == 1:
            shape |= {"image_mean": (0.0,), "image_std": (1.0,)}
        return cls(**{**shape, **kwargs})


class DPNASNetForImageClassification(PreTrainedModel):
    """DPNASNet with a classification loss; nothing in it couples the samples of a batch, so DP-SGD may train
    it.

    Args:
        config: Shape.

    Source: DPNAS, arXiv 2110.08557.
    """

    config_class = DPNASNetConfig
    main_input_name = "pixel_values"

    def __init__(self, config: DPNASNetConfig) -> None:
        super().__init__(config)
        self.network = DPNASNet(
            Genotype.from_triples(config.genotype),
            in_channels=config.in_channels,
            image_size=config.image_size,
            num_labels=config.num_labels,
            stem_channels=config.stem_channels,
            cell_channels=config.cell_channels,
            groups=config.groups,
            head_activation=config.head_activation,
            fifth=config.fifth,
        )
        initialise_(self.network)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # The constructor has drawn the weights by the release's rule; transformers' own must not draw again.
        return

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None
    ) -> ImageClassifierOutput:
        """Logits, and the mean cross entropy where labels are given.

        Args:
            pixel_values: Images (N, C, H, W), normalised.
            labels: Class numbers (N,), int64.
            return_dict: Accepted as the pipelines pass it; an output object is returned either way.
        """
        logits = self.network(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


class DPNASNetImageProcessor(BaseImageProcessor):
    """Pictures to normalised tensors of the size and channels a DPNASNet takes.

    Args:
        image_size: Side in pixels.
        in_channels: 1 turns pictures grey, 3 keeps colour.
        image_mean: Subtracted from pixels in [0, 1].
        image_std: Divides them.
        kwargs: As in `BaseImageProcessor`.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 3,
        image_mean: Sequence[float] = (0.485, 0.456, 0.406),
        image_std: Sequence[float] = (0.229, 0.224, 0.225),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_size, self.in_channels = image_size, in_channels
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    @classmethod
    def for_model(cls, config: DPNASNetConfig) -> "DPNASNetImageProcessor":
        """The processor that fits a model."""
        return cls(config.image_size, config.in_channels, config.image_mean, config.image_std)

    def preprocess(
        self, images: Image.Image | Sequence[Image.Image], return_tensors: str | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Resize, scale to [0, 1], normalise.

        Args:
            images: One picture or several, any size and mode.
            return_tensors: ``pt`` or ``np``.
            kwargs: Not used; the pipelines pass options of other processors.
        """
        several = [images] if isinstance(images, Image.Image) else list(images)
        size = (self.image_size, self.image_size)
        mode = "L" if self.in_channels == 1 else "RGB"
        resized = [picture.convert(mode).resize(size) for picture in several]
        pixels = [np.asarray(picture, dtype=np.float32).reshape(*size, -1) / 255 for picture in resized]
        batch = np.stack([x.transpose(2, 0, 1) for x in pixels])
        mean, std = (
            np.asarray(values, dtype=np.float32).reshape(1, -1, 1, 1)
            for values in (self.image_mean, self.image_std)
        )
        return BatchFeature({"pixel_values": (batch - mean) / std}, tensor_type=return_tensors)


AutoConfig.register("dpnasnet", DPNASNetConfig)
AutoModelForImageClassification.register(DPNASNetConfig, DPNASNetForImageClassification)
AutoImageProcessor.register(DPNASNetConfig, slow_image_processor_class=DPNASNetImageProcessor)
