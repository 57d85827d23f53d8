"""SpatialFlow's heads as modules of mmdet: boxes with flows, thing masks, stuff, and their fusion."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule, build_activation_layer
from mmcv.ops import ModulatedDeformConv2d
from mmdet.models.dense_heads import RetinaHead
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.seg_heads.base_semantic_head import BaseSemanticHead
from mmdet.models.seg_heads.panoptic_fusion_heads import HeuristicFusionHead
from mmdet.models.utils import unpack_gt_instances
from mmdet.registry import MODELS
from mmengine.model import BaseModule, constant_init, kaiming_init
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn

from mm_plugins.spatialflow.flows import FLOWS, SubNetworks, forward_all, forward_boxes
from mm_plugins.spatialflow.fusion import fuse
from mm_plugins.spatialflow.stuff_targets import IGNORED, loss_area, stuff_labels

FUSION_DEFAULTS = {"score_thr": 0.37, "mask_overlap": 0.37, "stuff_area_limit": 4900, "box_fill": 0.5}
"""``test_cfg.panoptic`` of the published models."""


class SteeredConv(BaseModule):
    """Modulated deformable 3x3 convolution and ReLU; offsets and modulation come from outside, from a
    flow."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = ModulatedDeformConv2d(in_channels, out_channels, 3, padding=1, bias=True)
        self.activate = build_activation_layer(dict(type="ReLU", inplace=True))

    def forward(self, x: Tensor, offset: Tensor, modulation: Tensor) -> Tensor:
        """Convolve (N, C, H, W) at the sampling points given by (N, 18, H, W) and (N, 9, H, W)."""
        return self.activate(self.conv(x, offset.contiguous(), modulation.contiguous()))


@MODELS.register_module()
class SpatialFlowHead(RetinaHead):
    """RetinaNet's head with two more sub-networks, and flows from box regression into the other three.

    Parameter names are those of the authors' release.

    Args:
        num_classes: Number of thing classes.
        in_channels: Channels of the pyramid; must equal ``feat_channels``.
        stacked_convs: Convolutions in classification and in regression.
        stacked_mask_convs: Convolutions in the mask sub-network, along the last steps.
        stacked_stuff_convs: Convolutions in the stuff sub-network; must equal `stacked_convs`.
        dcn_cls_convs_idx: Steps of classification whose convolution is deformable and steered by its flow.
        dcn_reg_convs_idx: Steps of regression with an ordinary deformable convolution (DCNv2).
        dcn_mask_convs_idx: As `dcn_cls_convs_idx`, for masks.
        dcn_stuff_convs_idx: As `dcn_cls_convs_idx`, for stuff.
        flows: Flows that exist: ``cls``, ``stuff``, ``mask``, ``stuff_mask``. Empty: four plain sub-networks.
        num_flow_levels: Levels, from the finest, that have stuff and mask sub-networks.
        fuse_flow_convs: Run the flow convolutions that read one feature as a single one; same numbers.
        init_cfg: How weights start; by default N(0, 0.01), and a prior of 0.01 for classes.
        **retina: Further arguments of mmdet's RetinaHead.

    Raises:
        ValueError: If a flow or step is unknown, or the numbers do not fit together.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        stacked_convs: int = 4,
        stacked_mask_convs: int = 1,
        stacked_stuff_convs: int = 4,
        dcn_cls_convs_idx: Sequence[int] | None = None,
        dcn_reg_convs_idx: Sequence[int] | None = None,
        dcn_mask_convs_idx: Sequence[int] | None = None,
        dcn_stuff_convs_idx: Sequence[int] | None = None,
        *,
        flows: Sequence[str] = FLOWS,
        num_flow_levels: int = 3,
        fuse_flow_convs: bool = False,
        init_cfg: Mapping[str, Any] | None = None,
        **retina: Any,
    ) -> None:
        steps = {
            "cls": (dcn_cls_convs_idx, stacked_convs),
            "reg": (dcn_reg_convs_idx, stacked_convs),
            "mask": (dcn_mask_convs_idx, stacked_mask_convs),
            "stuff": (dcn_stuff_convs_idx, stacked_stuff_convs),
        }
        self.dcn = {name: frozenset(idx or ()) for name, (idx, _) in steps.items()}
        self.flows = tuple(flows)
        _check_flows(self.flows, self.dcn, {name: count for name, (_, count) in steps.items()})
        feat_channels = retina.get("feat_channels", 256)
        strides = retina.get("anchor_generator", {}).get("strides", (8, 16, 32, 64, 128))
        wrong = []
        if num_classes < 1:
            wrong.append(f"num_classes={num_classes}: without things, train a semantic segmentor (mmseg)")
        if stacked_stuff_convs != stacked_convs:
            wrong.append(
                f"stacked_stuff_convs={stacked_stuff_convs} must equal stacked_convs={stacked_convs}: every "
                "step sends one flow to stuff"
            )
        if not 1 <= stacked_mask_convs <= stacked_convs:
            wrong.append(
                f"stacked_mask_convs={stacked_mask_convs} must lie in [1, stacked_convs={stacked_convs}]: "
                "masks go along the last steps"
            )
        if in_channels != feat_channels:
            wrong.append(
                f"in_channels={in_channels} must equal feat_channels={feat_channels}: flows are added to the "
                "input of each step; set neck.out_channels to the same number"
            )
        if not 1 <= num_flow_levels <= len(strides):
            wrong.append(
                f"num_flow_levels={num_flow_levels} is not in [1, {len(strides)}], the levels of the pyramid"
            )
        if wrong:
            raise ValueError("SpatialFlowHead: " + " | ".join(wrong) + ".")
        self.stacked_mask_convs, self.stacked_stuff_convs = stacked_mask_convs, stacked_stuff_convs
        self.num_flow_levels, self.fuse_flow_convs = num_flow_levels, fuse_flow_convs
        super().__init__(
            num_classes,
            in_channels,
            stacked_convs=stacked_convs,
            init_cfg=init_cfg
            or dict(
                type="Normal",
                # A type matches by its exact name, so the deformable one is listed beside the plain one.
                layer=["Conv2d", "ModulatedDeformConv2d", "ModulatedDeformConv2dPack"],
                std=0.01,
                override=dict(type="Normal", name="retina_cls", std=0.01, bias_prob=0.01),
            ),
            **retina,
        )

    def _init_layers(self) -> None:
        channels, num, dcn = self.feat_channels, self.stacked_convs, self.dcn
        self.relu = nn.ReLU(inplace=True)
        self.cls_convs = nn.ModuleList(self._conv(i in dcn["cls"]) for i in range(num))
        self.reg_convs = nn.ModuleList(
            self._plain_conv(conv_cfg=dict(type="DCNv2", deform_groups=1) if i in dcn["reg"] else None)
            for i in range(num)
        )
        self.mask_convs = nn.ModuleList(self._conv(i in dcn["mask"]) for i in range(self.stacked_mask_convs))
        self.stuff_convs = nn.ModuleList(self._conv(i in dcn["stuff"]) for i in range(num))
        self.cls_spatial_flow_convs = self._flow_convs("cls", num)
        self.mask_spatial_flow_convs = self._flow_convs("mask", self.stacked_mask_convs)
        self.stuff_spatial_flow_convs = self._flow_convs("stuff", num)
        self.stuff_mask_flow_convs = self._flow_convs("stuff_mask", self.stacked_mask_convs)
        self.retina_cls = nn.Conv2d(channels, self.num_base_priors * self.cls_out_channels, 3, padding=1)
        self.retina_reg = nn.Conv2d(
            channels, self.num_base_priors * self.bbox_coder.encode_size, 3, padding=1
        )

    def _plain_conv(self, **changes: Any) -> ConvModule:
        settings = dict(conv_cfg=self.conv_cfg, norm_cfg=self.norm_cfg)
        settings.update({key: value for key, value in changes.items() if value is not None})
        return ConvModule(self.feat_channels, self.feat_channels, 3, padding=1, **settings)

    def _conv(self, steered: bool) -> nn.Module:
        return SteeredConv(self.feat_channels, self.feat_channels) if steered else self._plain_conv()

    def _flow_convs(self, name: str, count: int) -> nn.ModuleList:
        """Flow convolutions: no norm, no activation; 27 channels where they steer a deformable one."""
        steered = self.dcn.get(name, frozenset())
        return nn.ModuleList(
            ConvModule(
                self.feat_channels, 27 if i in steered else self.feat_channels, 3, padding=1, act_cfg=None
            )
            for i in range(count if name in self.flows else 0)
        )

    @property
    def sub_networks(self) -> SubNetworks:
        """The layers, in the form that the core computes with."""
        return SubNetworks(
            reg=list(self.reg_convs),
            cls=list(self.cls_convs),
            stuff=list(self.stuff_convs),
            mask=list(self.mask_convs),
            cls_flow=list(self.cls_spatial_flow_convs),
            stuff_flow=list(self.stuff_spatial_flow_convs),
            mask_flow=list(self.mask_spatial_flow_convs),
            stuff_mask_flow=list(self.stuff_mask_flow_convs),
            steered_cls=self.dcn["cls"],
            steered_stuff=self.dcn["stuff"],
            steered_mask=self.dcn["mask"],
        )

    def forward(
        self, x: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Run all levels.

        Args:
            x: Features of the pyramid, finest first.

        Returns:
            Class logits and box deltas of every level, stuff and mask features of the flow levels.
        """
        cls_scores, bbox_preds = [], []
        stuff: list[Tensor] = []
        mask: list[Tensor] = []
        nets = self.sub_networks
        for level, feature in enumerate(x):
            if level < self.num_flow_levels:
                out = forward_all(feature, nets, fuse=self.fuse_flow_convs)
                assert out.stuff is not None, "these levels have a stuff sub-network"
                assert out.mask is not None, "these levels have a mask sub-network"
                stuff.append(out.stuff)
                mask.append(out.mask)
            else:
                out = forward_boxes(feature, nets)
            cls_scores.append(self.retina_cls(out.cls))
            bbox_preds.append(self.retina_reg(out.reg))
        return cls_scores, bbox_preds, tuple(stuff), tuple(mask)

    def loss(self, x: Sequence[Tensor], batch_data_samples: list) -> dict[str, list[Tensor]]:
        """Losses of classes and boxes alone; the host's form cannot take this head's further outputs."""
        return self.box_loss(self(x), batch_data_samples)

    def box_loss(self, outs: tuple, batch_data_samples: list) -> dict[str, list[Tensor]]:
        """Losses of classes and boxes from what `forward` returned."""
        gt_instances, ignored, metas = unpack_gt_instances(batch_data_samples)
        return self.loss_by_feat(outs[0], outs[1], gt_instances, metas, ignored)

    def predict(
        self, x: Sequence[Tensor], batch_data_samples: list, rescale: bool = False
    ) -> list[InstanceData]:
        """Boxes alone."""
        metas = [sample.metainfo for sample in batch_data_samples]
        cls_scores, bbox_preds, *_ = self(x)
        return self.predict_by_feat(cls_scores, bbox_preds, batch_img_metas=metas, rescale=rescale)

    def loss_and_predict(
        self, x: Sequence[Tensor], batch_data_samples: list, proposal_cfg: Any = None
    ) -> tuple[dict, list[InstanceData]]:
        """Losses of classes and boxes, and the boxes."""
        outs = self(x)
        metas = [sample.metainfo for sample in batch_data_samples]
        boxes = self.predict_by_feat(outs[0], outs[1], batch_img_metas=metas, cfg=proposal_cfg)
        return self.box_loss(outs, batch_data_samples), boxes


def _check_flows(flows: Sequence[str], dcn: Mapping[str, frozenset[int]], counts: Mapping[str, int]) -> None:
    for name in flows:
        if name not in FLOWS:
            near = get_close_matches(name, FLOWS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"flows={tuple(flows)} has unknown {name!r}; the flows are {FLOWS}.{hint}")
    for name, steps in dcn.items():
        beyond = sorted(i for i in steps if not 0 <= i < counts[name])
        if beyond:
            raise ValueError(
                f"dcn_{name}_convs_idx holds {beyond}; the {name} sub-network has steps 0 to "
                f"{counts[name] - 1}. Count from 0."
            )
        if steps and name != "reg" and name not in flows:
            raise ValueError(
                f"dcn_{name}_convs_idx={sorted(steps)} needs the flow {name!r}, which gives the offsets. Add "
                f"{name!r} to flows, or drop dcn_{name}_convs_idx."
            )


@MODELS.register_module()
class SpatialFlowMaskHead(StandardRoIHead):
    """Thing masks from the mask sub-network: RoIAlign and a mask head, without a box head.

    Takes the arguments of mmdet's StandardRoIHead but for those of the box head. In training, masks are
    learned on all predicted boxes that meet an object, and on all annotated boxes.

    Args:
        mask_roi_extractor: Config of the RoI extractor.
        mask_head: Config of the mask head.
        train_cfg: ``assigner``, ``sampler``, ``mask_size``, ``pos_weight``.
        test_cfg: ``mask_thr_binary``.
        init_cfg: Weights to start with.
    """

    def __init__(
        self,
        mask_roi_extractor: Mapping[str, Any],
        mask_head: Mapping[str, Any],
        train_cfg: Mapping[str, Any] | None = None,
        test_cfg: Mapping[str, Any] | None = None,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            mask_roi_extractor=mask_roi_extractor,
            mask_head=mask_head,
            train_cfg=train_cfg,
            test_cfg=test_cfg,
            init_cfg=init_cfg,
        )

    def sample(self, boxes: list[InstanceData], batch_data_samples: list) -> list:
        """Positive boxes of each image, annotated ones first.

        Args:
            boxes: Predicted boxes in pixels of the network's input.
            batch_data_samples: Images with their annotation.

        Returns:
            mmdet's sampling results.
        """
        gt_instances, ignored, _ = unpack_gt_instances(batch_data_samples)
        results = []
        for proposals, gt, gt_ignored in zip(boxes, gt_instances, ignored, strict=True):
            priors = InstanceData(priors=proposals.bboxes)
            assigned = self.bbox_assigner.assign(priors, gt, gt_ignored)
            results.append(self.bbox_sampler.sample(assigned, priors, gt))
        return results

    def loss(
        self, x: Sequence[Tensor], rpn_results_list: list[InstanceData], batch_data_samples: list
    ) -> dict[str, Tensor]:
        """Mask loss on the sampled boxes.

        Args:
            x: Features of the mask sub-network.
            rpn_results_list: Predicted boxes, detached.
            batch_data_samples: Images with their annotation.

        Returns:
            ``loss_mask``.
        """
        results = self.sample(rpn_results_list, batch_data_samples)
        gt_instances, *_ = unpack_gt_instances(batch_data_samples)
        return self.mask_loss(x, results, None, gt_instances)["loss_mask"]

    def mask_probabilities(self, x: Sequence[Tensor], rois: Tensor) -> Tensor:
        """Probabilities (R, classes, 28, 28) inside of R regions; several views average them."""
        return self._mask_forward(x, rois)["mask_preds"].sigmoid()


@MODELS.register_module()
class SpatialFlowStuffHead(BaseSemanticHead):
    """Stuff from the features of the stuff sub-network: per level up to stride 4, summed, classified, x4.

    Stuff classes come first and the one channel for all things comes last, as everywhere in mmdet.

    Args:
        num_things_classes: Number of thing classes.
        num_stuff_classes: Number of stuff classes.
        in_channels: Channels of the features.
        feat_channels: Channels inside.
        feat_strides: Strides of the levels used.
        conv_cfg: Convolution layers.
        norm_cfg: Normalisation.
        loss_seg: Loss; its weight 0.5 is what the release's 0.25 amounts to with two images a GPU.
        loss_resolution: ``full`` (the paper's) or ``quarter`` (as PanopticFPN; a sixteenth of the memory).
        normalise: ``valid``, or ``official`` to repeat the release's loss with its faults.
        legacy_resize: Enlarge the prediction to the image by nearest neighbour, as the release does.
        init_cfg: Weights to start with.

    Raises:
        ValueError: If a choice is unknown, strides are none of 4, 8, 16, ..., or there are too many classes.
    """

    def __init__(
        self,
        num_things_classes: int = 80,
        num_stuff_classes: int = 53,
        in_channels: int = 256,
        feat_channels: int = 128,
        feat_strides: Sequence[int] = (8, 16, 32),
        conv_cfg: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] = dict(type="GN", num_groups=32, requires_grad=True),  # noqa: B006
        loss_seg: Mapping[str, Any] = dict(  # noqa: B006
            type="CrossEntropyLoss", ignore_index=IGNORED, loss_weight=0.5
        ),
        *,
        loss_resolution: Literal["full", "quarter"] = "full",
        normalise: Literal["valid", "official"] = "valid",
        legacy_resize: bool = False,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        wrong = []
        if loss_resolution not in ("full", "quarter"):
            wrong.append(f"loss_resolution must be 'full' or 'quarter'; got {loss_resolution!r}")
        if normalise not in ("valid", "official"):
            wrong.append(f"normalise must be 'valid' or 'official'; got {normalise!r}")
        if loss_seg.get("ignore_index") != IGNORED:
            wrong.append(
                f"loss_seg.ignore_index must be {IGNORED}, mmdet's label for void; got "
                f"{loss_seg.get('ignore_index')}"
            )
        if any(stride < 4 or stride & (stride - 1) for stride in feat_strides):
            wrong.append(f"feat_strides must be powers of 2 from 4 on; got {tuple(feat_strides)}")
        if num_things_classes + num_stuff_classes > IGNORED:
            wrong.append(
                f"{num_things_classes} + {num_stuff_classes} classes do not fit: label {IGNORED} means void. "
                f"At most {IGNORED} classes can be told apart"
            )
        if wrong:
            raise ValueError("SpatialFlowStuffHead: " + " | ".join(wrong) + ".")
        super().__init__(
            num_stuff_classes + 1,
            seg_rescale_factor=1.0 if loss_resolution == "full" else 0.25,
            loss_seg=loss_seg,
            init_cfg=init_cfg,
        )
        self.num_things_classes, self.num_stuff_classes = num_things_classes, num_stuff_classes
        self.feat_strides = tuple(feat_strides)
        self.loss_resolution, self.normalise, self.legacy_resize = loss_resolution, normalise, legacy_resize
        self.lateral_convs = nn.ModuleList()
        for stride in feat_strides:
            num_ups = (stride // 4).bit_length() - 1
            layers: list[nn.Module] = []
            for i in range(max(num_ups, 1)):
                channels = in_channels if i == 0 else feat_channels
                layers.append(
                    ConvModule(channels, feat_channels, 3, padding=1, conv_cfg=conv_cfg, norm_cfg=norm_cfg)
                )
                if num_ups:
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True))
            self.lateral_convs.append(nn.Sequential(*layers))
        self.conv = nn.Conv2d(feat_channels, self.num_classes, 1)

    def init_weights(self) -> None:
        """Kaiming for convolutions, ones for the normalisation."""
        super().init_weights()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                kaiming_init(module)
            elif isinstance(module, (nn.GroupNorm, nn.BatchNorm2d)):
                constant_init(module, 1)

    def forward(self, x: Sequence[Tensor]) -> dict[str, Tensor]:
        """Logits ``seg_preds`` (N, num_stuff + 1, H, W) at the input's size (or a quarter) and ``seg_feats``.

        Raises:
            ValueError: If the levels do not meet at stride 4.
        """
        used = x[: len(self.lateral_convs)]
        sizes = {
            tuple(side * stride for side in feature.shape[2:])
            for feature, stride in zip(used, self.feat_strides, strict=True)
        }
        if len(sizes) > 1:
            raise ValueError(
                f"the levels cover different sizes {sorted(sizes)}: the network's input is no multiple of "
                f"{max(self.feat_strides)} pixels. Set "
                f"data_preprocessor.pad_size_divisor={max(self.feat_strides)}."
            )
        feats = sum(lateral(feature) for feature, lateral in zip(used, self.lateral_convs, strict=True))
        logits = self.conv(feats)
        if self.loss_resolution == "full":
            logits = F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=True)
        return dict(seg_preds=logits, seg_feats=feats)

    def loss(self, x: Sequence[Tensor], batch_data_samples: list) -> dict[str, Tensor]:
        """Cross entropy over the pixels of the images, padding left out.

        Args:
            x: Features of the stuff sub-network.
            batch_data_samples: Images with ``gt_sem_seg``.

        Returns:
            ``loss_seg``.
        """
        logits = self(x)["seg_preds"]
        labels = torch.stack([sample.gt_sem_seg.sem_seg[0] for sample in batch_data_samples])
        step = 1 if self.loss_resolution == "full" else 4
        sizes = [
            (-(-sample.metainfo["img_shape"][0] // step), -(-sample.metainfo["img_shape"][1] // step))
            for sample in batch_data_samples
        ]
        target = stuff_labels(labels[:, ::step, ::step], self.num_things_classes, self.num_stuff_classes)
        target, area = loss_area(target, sizes, mode=self.normalise)
        return dict(loss_seg=self.loss_seg(logits, target, avg_factor=area))

    def predict(
        self, x: Sequence[Tensor], batch_img_metas: list[dict], rescale: bool = False
    ) -> list[Tensor]:
        """Logits (num_stuff + 1, h, w) of each image, at its original size if `rescale`."""
        return self.resize_logits(self(x)["seg_preds"], batch_img_metas, rescale=rescale)

    def resize_logits(self, logits: Tensor, batch_img_metas: list[dict], *, rescale: bool) -> list[Tensor]:
        """Logits of each image without the padding, at its original size if `rescale`."""
        size = tuple(batch_img_metas[0]["batch_input_shape"])
        if tuple(logits.shape[2:]) != size:
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        out = []
        for image, meta in zip(logits, batch_img_metas, strict=True):
            height, width = meta["img_shape"][:2]
            image = image[None, :, :height, :width]
            if rescale:
                # Nearest neighbour commutes with argmax: this is the release's resizing of labels.
                mode = (
                    dict(mode="nearest") if self.legacy_resize else dict(mode="bilinear", align_corners=False)
                )
                image = F.interpolate(image, size=tuple(meta["ori_shape"][:2]), **mode)
            out.append(image[0])
        return out


@MODELS.register_module()
class SpatialFlowFusionHead(HeuristicFusionHead):
    """mmdet's heuristic fusion with a score threshold, box fill, and work inside of the boxes only.

    Args:
        num_things_classes: Number of thing classes.
        num_stuff_classes: Number of stuff classes.
        test_cfg: ``score_thr``, ``mask_overlap``, ``stuff_area_limit``, ``box_fill`` (None for none);
            what is left out has the value of the published models.
        init_cfg: Not used; there are no weights.
        cropped: Work inside of each box; False repeats it on whole maps, for comparisons.

    Raises:
        ValueError: If an option is unknown or out of range.
    """

    def __init__(
        self,
        num_things_classes: int = 80,
        num_stuff_classes: int = 53,
        test_cfg: Mapping[str, Any] | None = None,
        init_cfg: Mapping[str, Any] | None = None,
        *,
        cropped: bool = True,
    ) -> None:
        given = dict(test_cfg or {})
        unknown = sorted(set(given) - set(FUSION_DEFAULTS))
        if unknown:
            raise ValueError(
                f"test_cfg.panoptic has unknown {unknown}; it takes {', '.join(FUSION_DEFAULTS)}."
            )
        self.settings = {**FUSION_DEFAULTS, **given}
        for name in ("score_thr", "mask_overlap", "box_fill"):
            value = self.settings[name]
            if not (value is None and name == "box_fill") and not 0 <= value <= 1:
                raise ValueError(
                    f"test_cfg.panoptic.{name} must lie in [0, 1]; got {value}. It is a share: write 0.37 "
                    "for 37 %."
                )
        self.cropped = cropped
        super().__init__(num_things_classes, num_stuff_classes, test_cfg=test_cfg, init_cfg=init_cfg)

    def _predict_single(self, mask_results: InstanceData, seg_preds: Tensor, **kwargs: Any) -> PixelData:
        del kwargs  # The host's signature; nothing is passed.
        panoptic = fuse(
            mask_results.masks,
            mask_results.bboxes,
            mask_results.scores,
            mask_results.labels,
            seg_preds.argmax(dim=0),
            num_things=self.num_things_classes,
            num_stuff=self.num_stuff_classes,
            cropped=self.cropped,
            **self.settings,
        )
        return PixelData(sem_seg=panoptic[None])
