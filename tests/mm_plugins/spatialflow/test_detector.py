"""The detector: losses at known points, gradients, predictions, views, and the host's own training."""

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.runner import Runner
from torch import Tensor, nn

from mm_plugins.spatialflow.detector import SpatialFlow, SpatialFlowTTAModel
from tests.mm_plugins.spatialflow import tiny

pytestmark = pytest.mark.host


@pytest.fixture
def model() -> SpatialFlow:
    return tiny.detector(**tiny.SMALL_CLASSES)


def losses(model: nn.Module, batch: dict[str, list]) -> dict[str, Any]:
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    return model.loss(data["inputs"], data["data_samples"])


def total(value: Any) -> Tensor:
    return sum(value) if isinstance(value, list) else value


def undecided(model: nn.Module) -> nn.Module:
    """Predictors that answer the prior, or nothing, everywhere."""
    nn.init.zeros_(model.bbox_head.retina_cls.weight)
    nn.init.constant_(model.bbox_head.retina_cls.bias, -math.log(99))
    for layer in (model.semantic_head.conv, model.roi_head.mask_head.conv_logits):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def expected_cls_loss(positives: int, anchors: int, classes: int) -> float:
    """Focal loss at p = 0.01: a positive costs .25 * .99^2 * ln 100, a negative .75 * .01^2 * -ln .99; the
    sum over all anchors and classes is divided by the positives."""
    right = 0.25 * 0.99**2 * math.log(100)
    wrong = 0.75 * 0.01**2 * -math.log(0.99)
    assert right == pytest.approx(1.1283818248, rel=1e-9)
    assert wrong == pytest.approx(7.537751890e-7, rel=1e-9)
    return (positives * right + (classes * anchors - positives) * wrong) / positives


def count_anchors(model: nn.Module, batch: dict[str, list]) -> tuple[int, int]:
    """Positive anchors of a batch, and those that count: all but the ones between the two IoU thresholds."""
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    head, samples = model.bbox_head, data["data_samples"]
    sizes = [out.shape[-2:] for out in head(model.extract_feat(data["inputs"]))[0]]
    anchors, valid = head.get_anchors(sizes, [s.metainfo for s in samples], device="cpu")
    labels, weights, *_ = head.get_targets(
        anchors, valid, [s.gt_instances for s in samples], [s.metainfo for s in samples]
    )
    positives = sum(int(((level >= 0) & (level < head.num_classes)).sum()) for level in labels)
    return positives, sum(int((level > 0).sum()) for level in weights)


def test_losses_of_an_undecided_model_by_hand(model: SpatialFlow) -> None:
    batch = tiny.synthetic_batch([(64, 96), (96, 64)])
    found = losses(undecided(model), batch)
    assert set(found) == {"loss_cls", "loss_bbox", "loss_mask", "loss_seg"}
    assert len(found["loss_cls"]) == len(found["loss_bbox"]) == 5
    positives, anchors = count_anchors(model, batch)
    assert positives >= 4
    loss_cls = float(total(found["loss_cls"]).detach())
    assert loss_cls == pytest.approx(expected_cls_loss(positives, anchors, 3), rel=1e-5)
    assert float(found["loss_mask"].detach()) == pytest.approx(math.log(2), rel=1e-6)
    # Every pixel is labelled: 3 channels (2 stuff, 1 for things).
    assert float(found["loss_seg"].detach()) == pytest.approx(0.5 * math.log(3), rel=1e-6)


@pytest.mark.parity
def test_losses_on_the_real_pair() -> None:
    """panopticapi's two images at 320 pixels, 133 classes: 469 positives of 21,149 anchors give 1.131100; of
    the stuff pixels all but void count: .25 ln 54 * share = .976700."""
    model = undecided(tiny.detector("_base_/small", bbox_head__anchor_generator__octave_base_scale=4))
    batch = tiny.batch(tiny.coco_sample((320, 192)))
    positives, anchors = count_anchors(model, batch)
    found = losses(model, batch)
    assert (positives, anchors) == (469, 21_149)
    assert float(total(found["loss_cls"]).detach()) == pytest.approx(1.131100, abs=2e-6)
    assert float(found["loss_mask"].detach()) == pytest.approx(0.693147, abs=1e-6)
    assert float(found["loss_seg"].detach()) == pytest.approx(2 * 0.976700, abs=3e-6)


def test_every_parameter_learns_from_one_step(model: SpatialFlow) -> None:
    sum(total(loss) for loss in losses(model, tiny.synthetic_batch([(64, 96), (96, 64)])).values()).backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []
    silent = [
        name for name, p in model.named_parameters() if p.requires_grad and float(p.grad.abs().sum()) == 0
    ]
    assert silent == []


def test_images_without_objects_train_stuff(model: SpatialFlow) -> None:
    """No box and no mask loss; all stays finite and every parameter has a gradient, as DDP needs."""
    found = losses(model, tiny.synthetic_batch([(64, 64), (64, 96)], empty=True))
    assert float(total(found["loss_bbox"]).detach()) == 0
    assert float(found["loss_mask"].detach()) == 0
    assert float(found["loss_seg"].detach()) > 0
    sum(total(loss) for loss in found.values()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_at_the_start_masks_learn_on_annotated_boxes_alone(model: SpatialFlow) -> None:
    """All scores are about 0.01, below 0.05: no box is predicted."""
    data = model.data_preprocessor(tiny.synthetic_batch([(64, 64), (64, 64)]), True)
    outs = model.bbox_head(model.extract_feat(data["inputs"]))
    boxes = model._boxes(outs, data["data_samples"], cfg=model.proposal_cfg)
    assert [len(found) for found in boxes] == [0, 0]
    results = model.roi_head.sample(boxes, data["data_samples"])
    assert [(len(r.pos_priors), len(r.neg_priors)) for r in results] == [(2, 0), (2, 0)]


@pytest.mark.parity
def test_annotated_boxes_of_the_real_pair() -> None:
    """14 and 26 objects, no negatives; at the original size all 40 lie on P3."""
    model = tiny.detector()
    batch = tiny.batch(tiny.coco_sample())
    data = model.data_preprocessor(batch, True)
    outs = model.bbox_head(model.extract_feat(data["inputs"]))
    boxes = model._boxes(outs, data["data_samples"], cfg=model.proposal_cfg)
    results = model.roi_head.sample(boxes, data["data_samples"])
    assert [(len(r.pos_priors), len(r.neg_priors)) for r in results] == [(14, 0), (26, 0)]
    rois = torch.cat([torch.cat([torch.zeros(len(r.pos_priors), 1), r.pos_priors], dim=1) for r in results])
    levels = model.roi_head.mask_roi_extractor.map_roi_levels(rois, 3)
    assert levels.tolist() == [0] * 40


def overconfident(model: SpatialFlow) -> SpatialFlow:
    """A fresh model that finds something, so that there is something to compare."""
    nn.init.constant_(model.bbox_head.retina_cls.bias, 0.0)
    nn.init.normal_(model.bbox_head.retina_cls.weight, std=0.3)
    nn.init.normal_(model.semantic_head.conv.weight)
    return model.eval()


def predict(model: nn.Module, batch: dict[str, list]) -> list:
    with torch.no_grad():
        return model.test_step(copy.deepcopy(batch))


def test_predictions_of_a_batch_have_the_sizes_of_their_images(model: SpatialFlow) -> None:
    batch = tiny.synthetic_batch([(64, 96), (48, 50)])
    for sample, shape in zip(batch["data_samples"], [(128, 192), (48, 50)], strict=True):
        scale = sample.img_shape[0] / shape[0]
        sample.set_metainfo(dict(ori_shape=shape, scale_factor=(scale, scale)))
    for sample, shape in zip(predict(overconfident(model), batch), [(128, 192), (48, 50)], strict=True):
        panoptic = sample.pred_panoptic_seg.sem_seg
        assert panoptic.dtype == torch.int32
        assert tuple(panoptic.shape) == (1, *shape)
        found = sample.pred_instances
        assert len(found) > 0
        assert found.masks.dtype == torch.bool
        assert tuple(found.masks.shape) == (len(found), *shape)
        values = set(panoptic.unique().tolist())
        assert all(v % 1000 < 3 if v >= 1000 else 3 <= v <= 5 for v in values)


def test_without_detections_stuff_is_still_predicted(model: SpatialFlow) -> None:
    nn.init.constant_(model.bbox_head.retina_cls.bias, -20.0)
    model.semantic_head.conv.bias.data = torch.tensor([5.0, 0.0, 0.0])
    nn.init.zeros_(model.semantic_head.conv.weight)
    model.panoptic_fusion_head.settings["stuff_area_limit"] = 1
    (sample,) = predict(model.eval(), tiny.synthetic_batch([(64, 96)]))
    assert tuple(sample.pred_instances.masks.shape) == (0, 64, 96)
    assert (sample.pred_panoptic_seg.sem_seg == 3).all()


def test_one_image_predicts_the_same_alone_and_in_a_batch(model: SpatialFlow) -> None:
    """Equal sizes: nothing depends on batch mates."""
    batch = tiny.synthetic_batch([(64, 96), (64, 96)])
    together = predict(overconfident(model), batch)
    alone = [predict(model, {key: [value[i]] for key, value in batch.items()})[0] for i in range(2)]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.pred_instances.scores, b.pred_instances.scores, rtol=1e-4, atol=1e-5)
        assert (a.pred_panoptic_seg.sem_seg != b.pred_panoptic_seg.sem_seg).float().mean() < 1e-3


def test_raw_outputs(model: SpatialFlow) -> None:
    outs = model(torch.zeros(1, 3, 64, 64), mode="tensor")
    assert [len(out) for out in outs[:4]] == [5, 5, 3, 3]
    assert tuple(outs[4].shape) == (1, 3, 64, 64)


def views(model: SpatialFlow, batch: dict[str, list], directions: list[str | None]) -> dict[str, list]:
    """What a TTA pipeline hands over: by view, then by image."""
    data: dict[str, list] = {"inputs": [], "data_samples": []}
    for direction in directions:
        turned = copy.deepcopy(batch)
        for sample in turned["data_samples"]:
            sample.set_metainfo(dict(flip=direction is not None, flip_direction=direction))
        dims = {"horizontal": (-1,), "vertical": (-2,), "diagonal": (-2, -1)}
        if direction:
            turned["inputs"] = [image.flip(dims[direction]) for image in turned["inputs"]]
        for key in data:
            data[key].append(turned[key])
    return data


def tta(model: SpatialFlow) -> SpatialFlowTTAModel:
    return SpatialFlowTTAModel(module=model, data_preprocessor=None)


def test_one_view_is_the_plain_prediction(model: SpatialFlow) -> None:
    batch = tiny.synthetic_batch([(64, 96), (64, 64)])
    plain = predict(overconfident(model), batch)
    merged = tta(model).test_step(views(model, batch, [None]))
    for a, b in zip(plain, merged, strict=True):
        torch.testing.assert_close(a.pred_instances.bboxes, b.pred_instances.bboxes, rtol=1e-4, atol=1e-3)
        assert (a.pred_panoptic_seg.sem_seg != b.pred_panoptic_seg.sem_seg).float().mean() < 1e-3
        assert (a.pred_instances.masks != b.pred_instances.masks).float().mean() < 1e-3
    # Nothing was written into the settings: plain prediction afterwards is as before.
    again = predict(model, batch)
    assert all(
        torch.equal(a.pred_panoptic_seg.sem_seg, b.pred_panoptic_seg.sem_seg)
        for a, b in zip(plain, again, strict=True)
    )


@pytest.mark.parametrize("direction", ["horizontal", "vertical", "diagonal"])
def test_mirrored_views_are_turned_back(model: SpatialFlow, direction: str) -> None:
    """A single mirrored view gives the mirror image's prediction, turned back. Without box fill: it cuts
    coordinates to whole numbers towards the left and the top."""
    batch = tiny.synthetic_batch([(64, 64)])
    overconfident(model).panoptic_fusion_head.settings["box_fill"] = None
    only = tta(model).test_step(views(model, batch, [direction]))[0]
    mirrored = views(model, batch, [direction])
    plain = {key: value[0] for key, value in mirrored.items()}
    for sample in plain["data_samples"]:
        sample.set_metainfo(dict(flip=False))
    dims = {"horizontal": (-1,), "vertical": (-2,), "diagonal": (-2, -1)}[direction]
    expected = predict(model, plain)[0]
    turned = expected.pred_panoptic_seg.sem_seg.flip(dims)
    assert (only.pred_panoptic_seg.sem_seg % 1000 != turned % 1000).float().mean() < 0.02
    assert len(only.pred_instances) == len(expected.pred_instances)
    assert (only.pred_instances.masks != expected.pred_instances.masks.flip(dims)).float().mean() < 0.02


def test_views_of_several_sizes_and_empty_results(model: SpatialFlow) -> None:
    batch = tiny.synthetic_batch([(64, 96)])
    small = tiny.synthetic_batch([(32, 48)])
    for sample in small["data_samples"]:
        sample.set_metainfo(dict(ori_shape=(64, 96), scale_factor=(0.5, 0.5)))
    data = {key: [batch[key], small[key]] for key in batch}
    (sample,) = tta(overconfident(model)).test_step(data)
    assert tuple(sample.pred_panoptic_seg.sem_seg.shape) == (1, 64, 96)
    assert len(sample.pred_instances) > 0
    nn.init.constant_(model.bbox_head.retina_cls.bias, -20.0)
    nn.init.zeros_(model.bbox_head.retina_cls.weight)
    data = {key: [copy.deepcopy(batch[key]), copy.deepcopy(small[key])] for key in batch}
    (sample,) = tta(model).test_step(data)
    assert tuple(sample.pred_instances.masks.shape) == (0, 64, 96)
    with pytest.raises(NotImplementedError, match="call test_step with the views instead"):
        tta(model).merge_preds([])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bbox_head__num_classes": 4}, "one number of thing classes"),
        ({"semantic_head__num_stuff_classes": 4}, "one number of stuff classes"),
        ({"bbox_head__num_flow_levels": 2}, "num_flow_levels=2; make them equal"),
        ({"semantic_head__feat_strides": (8, 16)}, "semantic_head.feat_strides has 2 levels"),
    ],
)
def test_heads_that_disagree_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.detector(**(tiny.SMALL_CLASSES | changes))


def test_samples_without_labels_are_refused(model: SpatialFlow) -> None:
    batch = tiny.synthetic_batch([(64, 64)])
    del batch["data_samples"][0].gt_sem_seg
    with pytest.raises(ValueError, match="LoadPanopticAnnotations"):
        losses(model, batch)


def nuclei(work_dir: Path, **changes: Any) -> Config:
    config = Config.fromfile(tiny.CONFIGS / "spatialflow_r18_nuclei.py")
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.dataset.data_root = str(tiny.NUCLEI)
        loader.dataset.indices = 4
    config.val_evaluator.ann_file = str(tiny.NUCLEI / "panoptic_val.json")
    config.val_evaluator.seg_prefix = str(tiny.NUCLEI / "panoptic" / "val")
    config.test_evaluator = config.val_evaluator
    config.work_dir = str(work_dir)
    config.train_cfg.update(max_epochs=2, val_interval=2)
    config.merge_from_dict(changes)
    return config


@pytest.mark.slow
def test_the_host_trains_with_ema_and_resumes(tmp_path: Path) -> None:
    """One epoch, then resumed to the second: the step count goes on."""
    hooks = [*nuclei(tmp_path).custom_hooks, dict(type="EMAHook")]
    # With one step an epoch, the config's one-cycle schedule has no steps to rise in.
    changes = {"custom_hooks": hooks, "param_scheduler": []}
    Runner.from_cfg(nuclei(tmp_path, **changes, **{"train_cfg.max_epochs": 1})).train()
    rest = Runner.from_cfg(nuclei(tmp_path, **changes, resume=True))
    rest.train()
    assert (rest.epoch, rest.iter) == (2, 2)
    saved = torch.load(tmp_path / "epoch_2.pth", weights_only=False)
    assert saved["meta"]["iter"] == 2
    assert any(name.startswith("module.") for name in saved["ema_state_dict"])
    assert 0 <= rest.message_hub.get_scalar("val/coco_panoptic/PQ").current() <= 100


def test_mixed_precision(model: SpatialFlow) -> None:
    batch = tiny.synthetic_batch([(64, 96), (64, 64)])
    exact = losses(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = losses(model, batch)
    for name in exact:
        # bf16 has 8 bits: sums of many products differ by a few per cent.
        assert float(total(rough[name]).detach()) == pytest.approx(
            float(total(exact[name]).detach()), rel=0.1
        )
    sum(total(loss) for loss in rough.values()).backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """mmdet's own train.py under torch.distributed.run with gloo; both shares of the images are counted."""
    config = nuclei(tmp_path / "work", **{"train_cfg.max_epochs": 1, "train_cfg.val_interval": 1})
    config.train_dataloader.batch_size = 1
    path = tmp_path / "config.py"
    config.dump(path)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29531"]
    command += [str(tiny.ROOT / "tools" / "mm.py"), "train", str(path), "--launcher", "pytorch"]
    command += ["--cfg-options", "env_cfg.dist_cfg.backend=gloo"]
    done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "coco_panoptic/PQ:" in done.stdout + done.stderr
    # Four validation images, background in each: all were counted, none twice.
    row = next(line for line in (done.stdout + done.stderr).splitlines() if "| background" in line)
    cells = [cell.strip() for cell in row.split("|")]
    assert int(cells[5]) + int(cells[7]) == 4


def test_registered() -> None:
    assert MODELS.get("SpatialFlow") is SpatialFlow
