"""The zoo's own functions on a handful of families; all that work, in the slow tier."""

import json
from pathlib import Path

import pytest
import torch
from mmengine.config import ConfigDict

from benchmarks import zoo

RESULT = Path(zoo.ROOT) / "docs" / "results" / "zoo.json"

HANDFUL = {
    # Part of a config's name, and ops that its training step or prediction must have called.
    "mmdet/retinanet/retinanet_r18": {"nms"},
    "mmdet/faster_rcnn/faster-rcnn_r50_fpn_soft-nms": {"nms", "softnms", "roi_align_backward"},
    "mmdet/mask_rcnn/mask-rcnn_r50_fpn": {"nms", "roi_align_forward", "roi_align_backward"},
    "mmdet/fcos/fcos_r50-caffe": {"nms"},
    "mmdet/dcnv2/mask-rcnn_r50-mdconv": {"modulated_deform_conv_forward", "modulated_deform_conv_backward"},
    "mmdet/deformable_detr/deformable-detr_r50": set(),
    "mmdet/carafe/faster-rcnn": {"carafe_forward", "carafe_backward"},
    "mmseg/fcn/fcn_r50": set(),
    "mmseg/psanet/": {"psamask_forward", "psamask_backward"},
    "mmseg/deeplabv3plus/": set(),
    "mmseg/segformer/": set(),
    "mmseg/point_rend/": set(),
}


def working_configs() -> list[str]:
    """Names of the configs that the recorded run calls working."""
    details = json.loads(RESULT.read_text(encoding="utf-8"))["details"] if RESULT.is_file() else {}
    return [name for name, outcome in details.items() if outcome["verdict"] == "works"]


@pytest.mark.parametrize("host", zoo.HOSTS)
def test_every_folder_is_run_or_left_out_with_a_reason(host: str) -> None:
    folders = {path.name for path in zoo.config_root(host).iterdir() if path.is_dir()}
    assert set(zoo.CASES[host]) | set(zoo.SKIPPED[host]) == folders
    assert not set(zoo.CASES[host]) & set(zoo.SKIPPED[host])


def test_shrink_by_hand() -> None:
    """Each rule once; what no rule names stays."""
    model = ConfigDict(
        backbone=dict(
            depth=50, norm_cfg=dict(type="SyncBN"), init_cfg=dict(type="Pretrained", checkpoint="url")
        ),
        neck=dict(init_cfg=dict(type="Xavier")),
        head=dict(num_classes=80, num_queries=900, loss_weight=2.0),
        pretrained="open-mmlab://resnet50",
        test_cfg=dict(nms_pre=1000, max_per_img=10, score_thr=0.05),
    )
    zoo.shrink(model, 64)
    assert model.backbone == dict(depth=50, norm_cfg=dict(type="BN"), init_cfg=None)
    assert model.neck.init_cfg == dict(type="Xavier")
    assert model.head == dict(num_classes=80, num_queries=20, loss_weight=2.0)
    assert model.pretrained is None
    assert model.test_cfg == dict(nms_pre=100, max_per_img=10, score_thr=0.0)


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (
            NotImplementedError("mmcv op 'foo' has no portable version in mm_plugins.compat."),
            "missing op foo",
        ),
        (ModuleNotFoundError("No module named 'torchvision'"), "needs package torchvision"),
        (RuntimeError('Please run "mim install mmpretrain" to install'), "needs package mmpretrain"),
        (ImportError('Please run "pip install sklearn" to install sklearn'), "needs package scikit-learn"),
        (zoo.DownloadRefused("https://x/y.pth would be fetched"), "needs download"),
        (
            TypeError("CascadeRPNHead.__init__() missing 1 required positional argument: 'num_classes'"),
            "fails upstream",
        ),
        (ValueError("something else"), "fails"),
    ],
)
def test_failures_are_told_apart(error: Exception, verdict: str) -> None:
    assert zoo.classify(error)[0] == verdict


def test_remote_weights_are_refused() -> None:
    with zoo.offline(), pytest.raises(zoo.DownloadRefused, match="would be fetched"):
        zoo.CheckpointLoader.load_checkpoint("https://example.org/model.pth")


def test_a_step_without_gradients_is_no_training() -> None:
    """A model whose loss does not depend on its parameters must not count as trained."""

    class Constant(torch.nn.Linear):
        def train_step(self, batch: dict, optim_wrapper: zoo.GradientProbe) -> dict:
            loss = (self.weight * 0).sum()
            optim_wrapper.update_params(loss)
            return {"loss": loss}

    with pytest.raises(ValueError, match="none of 2 parameters got a gradient"):
        zoo.train_one_step(Constant(1, 1), {}, zoo.Outcome())


def test_only_names_the_form_of_a_config() -> None:
    with pytest.raises(ValueError, match="names look like 'mmdet/atss"):
        zoo.cases("no such family")


@pytest.mark.host
@pytest.mark.parametrize("name", HANDFUL)
def test_handful_trains_and_predicts(name: str) -> None:
    case = zoo.cases(name)[0]
    outcome = zoo.check_config(case)
    assert outcome.verdict == "works", outcome.where
    assert outcome.built
    assert outcome.trained
    assert outcome.predicted
    assert HANDFUL[name] <= set(outcome.ops)


@pytest.mark.slow
@pytest.mark.parametrize("name", working_configs())
def test_family_works_as_recorded(name: str) -> None:
    case = next(case for case in zoo.cases() if case.name == name)
    outcome = zoo.check_config(case)
    assert outcome.verdict == "works", outcome.where
