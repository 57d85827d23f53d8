"""LaU in front of the output of any mmseg decode head that ends in one classifier."""

from collections.abc import Sequence
from typing import Any, Literal

import mmseg.models.decode_heads as hosts
import torch
import torch.nn.functional as F
from mmseg.models.decode_heads import EncHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.losses import CrossEntropyLoss
from mmseg.registry import MODELS
from torch import Tensor

from mm_plugins.lau.location_loss import pixel_loss
from mm_plugins.lau.loss import LocationAwareLoss, LocationTerms
from mm_plugins.lau.sampled_loss import FUSED_BACKENDS, sampled_cross_entropy
from mm_plugins.lau.upsample import LaUUpsample

LossResolution = Literal["lau", "label"]
# Heads of mmseg 1.2 that are offered by name; `LaUHead(base=...)` takes any other that fits, yours included.
BASES = (
    "ANNHead",
    "APCHead",
    "ASPPHead",
    "CCHead",
    "DMHead",
    "DNLHead",
    "DPTHead",
    "DepthwiseSeparableASPPHead",
    "DepthwiseSeparableFCNHead",
    "EMAHead",
    "EncHead",
    "FCNHead",
    "FPNHead",
    "GCHead",
    "ISAHead",
    "LRASPPHead",
    "LightHamHead",
    "NLHead",
    "OCRHead",
    "PSAHead",
    "PSPHead",
    "SETRMLAHead",
    "SETRUPHead",
    "SegformerHead",
    "UPerHead",
)


def why_unfit(base: type[Any]) -> str | None:
    """Why a head cannot be wrapped, or None if it can.

    LaU takes the place of `cls_seg`, the one classifier at the end of `BaseDecodeHead`, and weights the
    pixels of its plain decode loss. A head with several classifiers, its own loss or no `cls_seg` has no
    such place.
    """
    host: Any = base
    if not issubclass(base, BaseDecodeHead):
        return "it is no BaseDecodeHead"
    if issubclass(base, LaUMixin):
        return "it is wrapped already"
    if host.cls_seg is not BaseDecodeHead.cls_seg:
        return "it classifies in its own way (it overrides cls_seg)"
    if host.loss_by_feat not in (BaseDecodeHead.loss_by_feat, EncHead.loss_by_feat):
        return "it computes its own loss (several outputs, masks or boundaries)"
    if "cls_seg" not in host.forward.__code__.co_names:
        return "its forward never calls cls_seg"
    return None


class LaUMixin(BaseDecodeHead):
    """Put before a decode head: its output is k times larger, sampled at learned places.

    Args:
        lau: Options of `LaUUpsample` (without channels), and ``loss``: config of `LocationAwareLoss` or None;
            ``loss_resolution``: ``lau`` (the paper) takes the decode loss at k times the head's resolution,
            with the labels reduced by nearest neighbour, ``label`` enlarges the logits to the labels first;
            ``fused``: take the cross entropy piece by piece without ever holding the enlarged logits.
        head_args: Positional arguments of the head itself.
        head_options: Named arguments of the head itself.

    Raises:
        ValueError: If an option of `lau` is unknown or does not fit the head's loss.
    """

    def __init__(self, *head_args: Any, lau: dict[str, Any], **head_options: Any) -> None:
        super().__init__(*head_args, **head_options)
        options = dict(lau)
        loss, self.loss_resolution = options.pop("loss", None), options.pop("loss_resolution", "lau")
        self.fused = options.pop("fused", False)
        if self.loss_resolution not in ("lau", "label"):
            raise ValueError(f"lau.loss_resolution must be 'lau' or 'label'; got {self.loss_resolution!r}.")
        self.lau = LaUUpsample(self.conv_seg.in_channels, **options)
        self.location_loss = None if loss is None else _build_location_loss(loss)
        if self.location_loss is not None:
            _check_softmax(self)
            # The host hands a sampler's weights to every decode loss; one the user set still applies.
            inner: Any = self.sampler
            self.sampler: Any = LocationSampler(self, inner)
        if self.fused:
            _check_fused(self)
        self._sampled: list[tuple[Tensor, Tensor]] = []
        self._terms: LocationTerms | None = None
        self._reduced_label: Tensor | None = None

    def forward(self, *inputs: Any) -> Any:
        """The head's own forward; its logits are k times larger."""
        # Emptied here and not after the loss: activation checkpointing calls cls_seg again in backward.
        self._sampled = []
        return super().forward(*inputs)

    def cls_seg(self, feat: Tensor) -> Tensor:
        """Classify every cell, then let every pixel choose where to sample the result.

        The offsets see the feature before the classifier's dropout, as in the authors' release.
        """
        logits, offset = super().cls_seg(feat), self.lau.offsets(feat)
        if self.training:
            self._sampled.append((logits, offset))
            if self.fused:
                return logits
        return self.lau.sample(logits, offset)

    def loss_by_feat(
        self, seg_logits: Any, batch_data_samples: Sequence[Any], **options: Any
    ) -> dict[str, Tensor]:
        """The head's own losses, weighted by location, and the regression of the offsets.

        Args:
            seg_logits: Output of `forward`; the first of a tuple are the logits.
            batch_data_samples: The host's data samples.
            options: What the head's own method takes besides.

        Returns:
            The head's dictionary plus ``loss_lau_reg`` (mode ``reg``), ``lau_offset_abs`` (mean length of the
            offsets' components, in cells) and ``lau_moved_frac``.

        Raises:
            RuntimeError: If the head did not classify exactly once.
        """
        if len(self._sampled) != 1:
            raise RuntimeError(
                f"{type(self).__name__} called cls_seg {len(self._sampled)} times in one training step; LaU "
                "replaces exactly one classifier. Wrap another head, or use LaUUpsample inside this one."
            )
        (logits, offset), self._sampled = self._sampled[0], []
        size = (offset.shape[2], offset.shape[3])
        label = reduce_label(super()._stack_batch_gt(batch_data_samples), size)
        if self.fused:
            return self._fused_loss(logits, offset, label.squeeze(1))
        terms = None
        if self.location_loss is not None:
            upsampled = seg_logits if isinstance(seg_logits, Tensor) else seg_logits[0]
            own_loss = pixel_loss(upsampled.detach(), label.squeeze(1), self.ignore_index)
            terms = self._terms = self._location_terms(logits, offset, own_loss, label.squeeze(1))
        if self.loss_resolution == "lau":
            self._reduced_label = label
        losses = super().loss_by_feat(seg_logits, batch_data_samples, **options)
        self._terms = self._reduced_label = None
        return losses | _diagnostics(offset, terms)

    def _location_terms(
        self, logits: Tensor, offset: Tensor, own_loss: Tensor, label: Tensor
    ) -> LocationTerms | None:
        if self.location_loss is None:
            return None
        return self.location_loss(
            logits,
            offset,
            own_loss,
            label,
            scale=self.lau.scale_factor,
            base_grid=self.lau.base_grid,
            ignore_index=self.ignore_index,
        )

    def _fused_loss(self, logits: Tensor, offset: Tensor, label: Tensor) -> dict[str, Tensor]:
        own_loss, right = sampled_cross_entropy(
            logits,
            offset,
            label,
            scale=self.lau.scale_factor,
            base_grid=self.lau.base_grid,
            border_gradient=self.lau.border_gradient,
            ignore_index=self.ignore_index,
            backend=self.lau.backend,
        )
        terms = self._location_terms(logits, offset, own_loss, label)
        weighted = own_loss if terms is None else own_loss * terms.weight
        valid = (label != self.ignore_index).sum()
        count = valid.clamp(min=1) if self.loss_decode.avg_non_ignore else label.numel()
        losses = {self.loss_decode.loss_name: self.loss_decode.loss_weight * weighted.sum() / count}
        losses["acc_seg"] = 100 * right.sum() / valid.clamp(min=1)
        return losses | _diagnostics(offset, terms)

    def _stack_batch_gt(self, batch_data_samples: Sequence[Any]) -> Tensor:
        # The first request in a step is that of the decode loss; EncHead's second one, for the classes
        # present in the image, needs the labels as they are.
        label, self._reduced_label = self._reduced_label, None
        return super()._stack_batch_gt(batch_data_samples) if label is None else label

    def location_weight(self, size: tuple[int, int]) -> Tensor:
        """Lambda of the current step (N, H, W), repeated to a size."""
        assert self._terms is not None, "only asked for inside loss_by_feat, after the terms were computed"
        weight = self._terms.weight
        return weight if tuple(weight.shape[1:]) == size else F.interpolate(weight[:, None], size=size)[:, 0]


class LocationSampler:
    """The host's slot for pixel weights, filled with LaU's Lambda times those of the user's own sampler."""

    def __init__(self, head: LaUMixin, inner: Any) -> None:
        # A closure, not an attribute: a module inside a sampler inside that module would be a cycle.
        self._weight, self.inner = head.location_weight, inner

    def sample(self, seg_logit: Tensor, seg_label: Tensor) -> Tensor:
        """Weights (N, H, W) at the resolution of the labels given."""
        weight = self._weight((seg_label.shape[2], seg_label.shape[3]))
        return weight if self.inner is None else weight * self.inner.sample(seg_logit, seg_label)


def _build_location_loss(loss: dict[str, Any]) -> LocationAwareLoss:
    built = MODELS.build({"type": "LocationAwareLoss", **loss})
    if not isinstance(built, LocationAwareLoss):
        raise ValueError(
            f"lau.loss must be a LocationAwareLoss; got {type(built).__name__}. Others go to loss_decode."
        )
    return built


def _diagnostics(offset: Tensor, terms: LocationTerms | None) -> dict[str, Tensor]:
    """What goes to the log; only names with "loss" in them are summed by the host."""
    found = {"lau_offset_abs": offset.detach().abs().mean()}
    if terms is not None:
        found["lau_moved_frac"] = terms.moved
        if terms.regression is not None:
            found["loss_lau_reg"] = terms.regression
    return found


def _check_fused(head: "LaUMixin") -> None:
    """The fused loss stands for one plain softmax cross entropy at LaU's resolution, nothing else."""
    reasons = []
    loss = head.loss_decode
    if not isinstance(loss, CrossEntropyLoss) or loss.use_sigmoid or loss.use_mask or loss.class_weight:
        reasons.append("loss_decode must be one softmax CrossEntropyLoss without class_weight")
    if head.loss_resolution != "lau":
        reasons.append("loss_resolution must be 'lau'")
    if type(head).loss_by_feat is not LaUMixin.loss_by_feat or isinstance(head, EncHead):
        reasons.append("the head must have no further loss")
    if head.lau.num_groups != 1:
        reasons.append("num_groups must be 1")
    if head.lau.backend not in FUSED_BACKENDS:
        reasons.append(f"backend must be one of {', '.join(FUSED_BACKENDS)}")
    sampler = head.sampler.inner if isinstance(head.sampler, LocationSampler) else head.sampler
    if sampler is not None:
        reasons.append("the head must have no pixel sampler")
    if reasons:
        raise ValueError(f"lau.fused=True does not fit this head: {'; '.join(reasons)}. Set lau.fused=False.")


def _check_softmax(head: BaseDecodeHead) -> None:
    """The location loss compares softmax losses (or those of the one logit of a binary model)."""
    losses = head.loss_decode if isinstance(head.loss_decode, torch.nn.ModuleList) else [head.loss_decode]
    for loss in losses:
        if head.out_channels > 1 and vars(loss).get("use_sigmoid", False):
            raise ValueError(
                "lau.loss compares softmax losses, but loss_decode has use_sigmoid=True with "
                f"{head.out_channels} outputs. Use softmax, or out_channels=1, or leave lau.loss out."
            )


def reduce_label(label: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels (N, 1, H, W) at another size by nearest neighbour (every second pixel for half the size)."""
    if tuple(label.shape[2:]) == size:
        return label
    return F.interpolate(label.float(), size=size, mode="nearest").to(label.dtype)


def wrap_head(base: type[BaseDecodeHead]) -> type[LaUMixin]:
    """A class ``LaU<base>`` that takes `base`'s arguments and ``lau``.

    Raises:
        ValueError: If LaU does not fit that head; the message says why.
    """
    reason = why_unfit(base)
    if reason:
        raise ValueError(
            f"LaU cannot wrap {base.__name__}: {reason}. Heads that fit: {', '.join(BASES)}, and any other "
            "whose forward ends in one cls_seg call; elsewhere use the layer LaUUpsample."
        )
    doc = f"{base.__name__} with location-aware upsampling; see `LaUMixin` for ``lau``."
    return type(f"LaU{base.__name__}", (LaUMixin, base), {"__doc__": doc, "__module__": __name__})


for _name in BASES:
    MODELS.register_module(module=wrap_head(getattr(hosts, _name)))


@MODELS.register_module()
def LaUHead(*, base: str, lau: dict[str, Any], **head_options: Any) -> LaUMixin:
    """Build any fitting head with LaU: ``decode_head=dict(type="LaUHead", base="FCNHead", lau=dict(), ...)``.

    Args:
        base: Registered name of the head.
        lau: See `LaUMixin`.
        head_options: Arguments of that head.

    Raises:
        ValueError: If the name is unknown or LaU does not fit the head.
    """
    found = MODELS.get(base)
    if not isinstance(found, type):
        raise ValueError(
            f"LaUHead: base={base!r} is no registered head; for example FCNHead or EncHead. Import your own "
            "through custom_imports."
        )
    return wrap_head(found)(lau=lau, **head_options)
