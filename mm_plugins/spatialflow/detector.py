"""SpatialFlow as a detector of mmdet, and the model that tests it on several views of an image."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmcv.ops import batched_nms
from mmdet.models.detectors import SingleStageDetector
from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox2roi, bbox_flip
from mmengine.model import BaseTTAModel
from mmengine.structures import InstanceData
from torch import Tensor

Config = Mapping[str, Any]


@MODELS.register_module()
class SpatialFlow(SingleStageDetector):
    """Panoptic segmentation in one stage: boxes, thing masks and stuff that all know where the objects are.

    Args:
        backbone: Config of the backbone.
        neck: Config of the pyramid, P3 to P7.
        bbox_head: Config of the `SpatialFlowHead`.
        roi_head: Config of the `SpatialFlowMaskHead`.
        semantic_head: Config of the `SpatialFlowStuffHead`.
        panoptic_fusion_head: Config of the fusion.
        train_cfg: ``det`` (of the box head), ``det_proposal`` (boxes that masks learn on), ``mask``.
        test_cfg: ``det``, ``mask``, ``panoptic``.
        data_preprocessor: Config of the data preprocessor.
        init_cfg: Weights to start with.

    Raises:
        ValueError: If the heads disagree about classes or levels.
    """

    def __init__(
        self,
        backbone: Config,
        neck: Config,
        bbox_head: Config,
        roi_head: Config,
        semantic_head: Config,
        panoptic_fusion_head: Config,
        train_cfg: Config | None = None,
        test_cfg: Config | None = None,
        data_preprocessor: Config | None = None,
        init_cfg: Config | None = None,
    ) -> None:
        train_cfg, test_cfg = train_cfg or {}, test_cfg or {}
        super().__init__(
            backbone=backbone,
            neck=neck,
            bbox_head=copy.deepcopy(bbox_head),
            train_cfg=train_cfg.get("det"),
            test_cfg=test_cfg.get("det"),
            data_preprocessor=data_preprocessor,
            init_cfg=init_cfg,
        )
        self.roi_head = MODELS.build(
            {**roi_head, "train_cfg": train_cfg.get("mask"), "test_cfg": test_cfg.get("mask")}
        )
        self.semantic_head = MODELS.build(semantic_head)
        self.panoptic_fusion_head = MODELS.build(
            {**panoptic_fusion_head, "test_cfg": test_cfg.get("panoptic")}
        )
        self.proposal_cfg = train_cfg.get("det_proposal") or test_cfg.get("det")
        self.num_things_classes = self.panoptic_fusion_head.num_things_classes
        self.num_stuff_classes = self.panoptic_fusion_head.num_stuff_classes
        self.num_classes = self.num_things_classes + self.num_stuff_classes
        self._check_heads()

    def _check_heads(self) -> None:
        things = {
            "bbox_head.num_classes": self.bbox_head.num_classes,
            "roi_head.mask_head.num_classes": self.roi_head.mask_head.num_classes,
            "semantic_head.num_things_classes": self.semantic_head.num_things_classes,
            "panoptic_fusion_head.num_things_classes": self.num_things_classes,
        }
        stuff = {
            "semantic_head.num_stuff_classes": self.semantic_head.num_stuff_classes,
            "panoptic_fusion_head.num_stuff_classes": self.num_stuff_classes,
        }
        wrong = [
            f"all heads need one number of {kind} classes; got {counts}"
            for kind, counts in (("thing", things), ("stuff", stuff))
            if len(set(counts.values())) > 1
        ]
        levels = {
            "roi_head.mask_roi_extractor.featmap_strides": len(
                self.roi_head.mask_roi_extractor.featmap_strides
            ),
            "semantic_head.feat_strides": len(self.semantic_head.feat_strides),
        }
        wrong += [
            f"{name} has {count} levels, bbox_head.num_flow_levels={self.bbox_head.num_flow_levels}; make "
            "them equal"
            for name, count in levels.items()
            if count != self.bbox_head.num_flow_levels
        ]
        if wrong:
            raise ValueError("SpatialFlow: " + " | ".join(wrong) + ".")

    def loss(self, batch_inputs: Tensor, batch_data_samples: list) -> dict[str, Tensor | list[Tensor]]:
        """All losses of a batch.

        Args:
            batch_inputs: Images (N, 3, H, W), padded to a multiple of 32.
            batch_data_samples: Their annotation: instances with masks, and ``gt_sem_seg``.

        Returns:
            ``loss_cls`` and ``loss_bbox`` (one a level), ``loss_mask``, ``loss_seg``.

        Raises:
            ValueError: If masks or semantic labels are missing.
        """
        for sample in batch_data_samples:
            if "gt_sem_seg" not in sample or "masks" not in sample.gt_instances:
                raise ValueError(
                    "SpatialFlow learns from boxes, masks and semantic labels, and this sample has not all "
                    "of them. Load them with dict(type='LoadPanopticAnnotations') in train_pipeline."
                )
        outs = self.bbox_head(self.extract_feat(batch_inputs))
        losses = self.bbox_head.box_loss(outs, batch_data_samples)
        with torch.no_grad():
            boxes = self._boxes(outs, batch_data_samples, cfg=self.proposal_cfg)
        losses.update(self.roi_head.loss(outs[3], boxes, batch_data_samples))
        losses.update(self.semantic_head.loss(outs[2], batch_data_samples))
        return losses

    def predict(self, batch_inputs: Tensor, batch_data_samples: list, rescale: bool = True) -> list:
        """Instances and panoptic maps of a batch.

        Args:
            batch_inputs: Images (N, 3, H, W).
            batch_data_samples: Their meta information.
            rescale: Answer at the images' original sizes.

        Returns:
            The samples with ``pred_instances`` (boxes, scores, labels, masks) and ``pred_panoptic_seg``.
        """
        metas = [sample.metainfo for sample in batch_data_samples]
        outs = self.bbox_head(self.extract_feat(batch_inputs))
        instances = self._boxes(outs, batch_data_samples)
        instances = self.roi_head.predict_mask(outs[3], metas, instances, rescale=rescale)
        logits = self.semantic_head.predict(outs[2], metas, rescale)
        return self._with_predictions(batch_data_samples, instances, logits)

    def predict_views(self, views: Sequence[tuple[Tensor, list]], tta_cfg: Config | None = None) -> list:
        """Predictions from several views (sizes, mirror images) of each image of a batch.

        Boxes of all views before NMS go through one NMS; masks inside of the final boxes and stuff logits at
        the original size are averaged over the views.

        Args:
            views: For each view the batch of images and their samples, in one order of images.
            tta_cfg: ``nms`` and ``max_per_img``; those of ``test_cfg.det`` by default.

        Returns:
            The samples of the first view, with predictions at the original size.
        """
        outs = [self.bbox_head(self.extract_feat(inputs)) for inputs, _ in views]
        metas = [[sample.metainfo for sample in samples] for _, samples in views]
        boxes = [
            self._boxes(out, samples, rescale=True, with_nms=False)
            for out, (_, samples) in zip(outs, views, strict=True)
        ]
        cfg = {**self.bbox_head.test_cfg, **(tta_cfg or {})}
        logits = [
            self.semantic_head.predict(out[2], view_metas, True)
            for out, view_metas in zip(outs, metas, strict=True)
        ]
        instances, stuff = [], []
        for i in range(len(metas[0])):
            view_metas = [view[i] for view in metas]
            merged = _merge_boxes([view[i] for view in boxes], view_metas, cfg)
            merged.masks = self._merged_masks([out[3] for out in outs], merged, view_metas, i)
            instances.append(merged)
            turned = [_unflip(view[i], meta) for view, meta in zip(logits, view_metas, strict=True)]
            stuff.append(torch.stack(turned).mean(0))
        return self._with_predictions(views[0][1], instances, stuff)

    def _merged_masks(
        self, features: Sequence[Sequence[Tensor]], merged: InstanceData, metas: list[dict], index: int
    ) -> Tensor:
        height, width = metas[0]["ori_shape"][:2]
        if not len(merged):
            return merged.bboxes.new_zeros((0, height, width), dtype=torch.bool)
        total: Tensor | float = 0.0
        for feature, meta in zip(features, metas, strict=True):
            boxes = merged.bboxes
            if meta.get("flip"):
                boxes = bbox_flip(boxes, (height, width), meta["flip_direction"])
            scale = boxes.new_tensor(meta["scale_factor"]).repeat(2)
            alone = [level[index : index + 1] for level in feature]
            total = total + _unflip(self.roi_head.mask_probabilities(alone, bbox2roi([boxes * scale])), meta)
        (result,) = self.roi_head.mask_head.predict_by_feat(
            [total / len(metas)],
            [InstanceData(bboxes=merged.bboxes.clone(), labels=merged.labels)],
            [{**metas[0], "scale_factor": (1.0, 1.0)}],
            rcnn_test_cfg=self.roi_head.test_cfg,
            rescale=True,
            # They are probabilities already.
            activate_map=True,
        )
        return result.masks

    def _boxes(
        self, outs: tuple, samples: list, *, rescale: bool = False, **kwargs: Any
    ) -> list[InstanceData]:
        metas = [sample.metainfo for sample in samples]
        return self.bbox_head.predict_by_feat(
            outs[0], outs[1], batch_img_metas=metas, rescale=rescale, **kwargs
        )

    def _with_predictions(self, samples: list, instances: list[InstanceData], logits: list[Tensor]) -> list:
        panoptic = self.panoptic_fusion_head.predict(instances, logits)
        for sample, found, segments in zip(samples, instances, panoptic, strict=True):
            sample.pred_instances = found
            sample.pred_panoptic_seg = segments
        return samples

    def _forward(self, batch_inputs: Tensor, batch_data_samples: list | None = None) -> tuple:
        """Raw outputs, for tools that count operations: those of the box head, and stuff logits."""
        outs = self.bbox_head(self.extract_feat(batch_inputs))
        return (*outs, self.semantic_head(outs[2])["seg_preds"])


def _unflip(picture: Tensor, meta: dict) -> Tensor:
    """A map (..., h, w) of a mirrored view, turned back."""
    if not meta.get("flip"):
        return picture
    dims = {"horizontal": (-1,), "vertical": (-2,), "diagonal": (-2, -1)}[meta["flip_direction"]]
    return picture.flip(dims)


def _merge_boxes(views: list[InstanceData], metas: list[dict], cfg: Config) -> InstanceData:
    turned = [
        bbox_flip(view.bboxes, meta["ori_shape"][:2], meta["flip_direction"])
        if meta.get("flip")
        else view.bboxes
        for view, meta in zip(views, metas, strict=True)
    ]
    boxes, scores = torch.cat(turned), torch.cat([view.scores for view in views])
    labels = torch.cat([view.labels for view in views])
    if not len(boxes):
        return InstanceData(bboxes=boxes, scores=scores, labels=labels)
    found, keep = batched_nms(boxes, scores, labels, cfg["nms"])
    found, keep = found[: cfg["max_per_img"]], keep[: cfg["max_per_img"]]
    return InstanceData(bboxes=found[:, :4], scores=found[:, 4], labels=labels[keep])


@MODELS.register_module()
class SpatialFlowTTAModel(BaseTTAModel):
    """Test SpatialFlow on several views: ``tools/mm.py test CONFIG CHECKPOINT --tta``.

    Args:
        tta_cfg: ``nms`` and ``max_per_img`` of the boxes of all views; those of ``test_cfg.det`` by default.
        **model: As mmengine's BaseTTAModel takes it.
    """

    def __init__(self, tta_cfg: Config | None = None, **model: Any) -> None:
        super().__init__(**model)
        self.tta_cfg = tta_cfg

    @torch.no_grad()
    def test_step(self, data: Mapping[str, Sequence]) -> list:
        """Predict a batch whose every entry holds the views of an image.

        Args:
            data: ``inputs`` and ``data_samples``, each first by view, then by image.

        Returns:
            One sample an image.
        """
        views = [
            self.module.data_preprocessor({key: value[i] for key, value in data.items()}, False)
            for i in range(len(data["inputs"]))
        ]
        return self.module.predict_views(
            [(view["inputs"], view["data_samples"]) for view in views], self.tta_cfg
        )

    def merge_preds(self, data_samples_list: list) -> list:
        """Not used: views are merged before masks are predicted."""
        raise NotImplementedError(
            "SpatialFlow merges views before it predicts masks; call test_step with the views instead."
        )
