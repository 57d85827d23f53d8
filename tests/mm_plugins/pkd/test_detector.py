"""PKDDetector: what it refuses at build time, and the acceptance facts inside mmengine's Runner."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from mmdet.apis import init_detector
from mmdet.models.detectors import RetinaNet
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import Tensor

from mm_plugins.pkd.detector import (
    Distiller,
    PKDDetector,
    build_teacher,
    distill_options,
    distilled_class,
    export_student,
    inspect_config,
    teacher_model_config,
)
from tests.mm_plugins.pkd import tiny, two_processes
from tests.mm_plugins.pkd.conftest import Lesson, Trained
from tests.mm_plugins.pkd.reference import pkd_tensors

CONFIGS = Path(__file__).parents[3] / "configs" / "pkd"


@contextmanager
def logged(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> Iterator[list[str]]:
    """Messages that mmengine's current logger emits inside the block."""
    logger = MMLogger.get_current_instance()
    before = logger.level
    messages: list[str] = []
    logger.addHandler(caplog.handler)
    logger.setLevel(level)
    caplog.clear()
    try:
        yield messages
    finally:
        logger.removeHandler(caplog.handler)
        logger.setLevel(before)
        messages.extend(record.getMessage() for record in caplog.records)


def build(student: dict, teacher: dict, ckpt: object = None, /, **options: Any) -> nn.Module:
    return MODELS.build(tiny.distilled(student, teacher, ckpt, **options))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the tiny RetinaNet."""
    return tiny.write_weights(tmp_path_factory.mktemp("weights") / "teacher.pth", tiny.retinanet())


def batch(model: nn.Module, size: tuple[int, int] = (64, 64)) -> dict:
    """Two images, the second a little smaller, preprocessed by the model."""
    inputs = demo_mm_inputs(2, [[3, *size], [3, size[0] - 10, size[1] - 20]], num_classes=2)
    return model.data_preprocessor(inputs, True)


# ---- build time ------------------------------------------------------------------------------------------


def test_is_the_student_with_the_student_state_dict() -> None:
    """Fact 10: an instance of the student's class; no key of a teacher, none missing."""
    model = build(tiny.retinanet(), tiny.retinanet(channels=16))
    assert isinstance(model, RetinaNet)
    assert type(model) is distilled_class(RetinaNet)
    assert list(model.state_dict()) == list(MODELS.build(tiny.retinanet()).state_dict())
    assert len(list(model.modules())) == len(list(MODELS.build(tiny.retinanet()).modules()))


def test_weight_rule(caplog: pytest.LogCaptureFixture) -> None:
    """2.5: 6 for a two-stage teacher, 10 for a one-stage one, with a log line; a given weight wins."""
    with logged(caplog) as messages:
        assert build(tiny.retinanet(), tiny.faster_rcnn()).pkd.loss.loss_weight == 6.0
        assert build(tiny.retinanet(), tiny.retinanet()).pkd.loss.loss_weight == 10.0
        assert (
            build(tiny.retinanet(), tiny.retinanet(), loss={"loss_weight": 0.5}).pkd.loss.loss_weight == 0.5
        )
    rules = [message for message in messages if "loss_weight=" in message]
    assert len(rules) == 2
    assert "authors' value for a two-stage teacher" in rules[0]


def test_plain_mse_needs_a_weight() -> None:
    with pytest.raises(ValueError, match="Set it so that the loss starts near the detection loss"):
        build(tiny.retinanet(), tiny.retinanet(), loss={"type": "PlainMSELoss"})
    model = build(tiny.retinanet(), tiny.retinanet(), loss={"type": "PlainMSELoss", "loss_weight": 2.0})
    assert type(model.pkd.loss).__name__ == "PlainMSELoss"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pairng": "index"}, TypeError, "distill.* has no option .*'pairng'.*Did you mean 'pairing'?"),
        (
            {"loss": {"loss_wieght": 1.0}},
            TypeError,
            "distill.loss has no option .*Did you mean 'loss_weight'?",
        ),
        ({"student": {}}, TypeError, "distill has no option 'student'"),
        (
            {"pairing": "strides"},
            ValueError,
            "pairing.* must be one of .*'index', 'stride'.*Did you mean 'stride'?",
        ),
        ({"adapt": "linear"}, ValueError, "distill.adapt.* must be one of .*None, 'conv1x1'"),
        ({"teacher_mode": "train"}, ValueError, "distill.teacher_mode.* must be one of .*'eval', 'official'"),
        ({"teacher_amp": "fp32"}, ValueError, "distill.teacher_amp.* must be one of .*None, 'fp16', 'bf16'"),
        ({"stop_epoch": 0}, ValueError, "distill.stop_epoch must be at least 1; got 0.*leave it out"),
        ({"stop_iter": -3}, ValueError, "counts distilled iters from the start; leave it out to distil"),
        ({"levels": ()}, ValueError, "at least one level and none twice.*The authors use .0, 1, 2, 3."),
        ({"levels": (0, 0)}, ValueError, "must name at least one level and none twice; got .0, 0."),
        ({"levels": (0, 5)}, ValueError, "names level 5, but the student has 5 levels"),
        ({"loss": {"type": "MSELoss"}}, ValueError, "Use 'PKDLoss', or 'PlainMSELoss' for a control run"),
        ({"loss": {"type": "PKDLos"}}, ValueError, "is no loss between feature pyramids"),
        ({"teacher": 3}, TypeError, "must be a config name, a path or a dict.*got int.*Example"),
        ({"teacher": {"type": "x"}}, ValueError, "has no model.backbone.*the part under `detector`"),
        ({"teacher": "no.py"}, FileNotFoundError, "Give an absolute path, or 'mmdet::folder/name.py'"),
        ({"teacher": "mmdet::a/b.py"}, FileNotFoundError, "not among the configs of the installed package"),
    ],
)
def test_wrong_options(options: dict, error: type[Exception], message: str) -> None:
    """Each message says what was given, what is needed and how to mend it."""
    with pytest.raises(error, match=message):
        build(tiny.retinanet(), tiny.retinanet(), **options)


def test_channels_that_differ_need_an_adapter() -> None:
    """Fact 7: both counts at build time."""
    message = "the student's neck gives 16 channels, the teacher's 24; .*distill.adapt='conv1x1'"
    with pytest.raises(ValueError, match=message):
        build(tiny.retinanet(), tiny.retinanet(channels=24))


def test_adapters_are_bias_free_parts_of_the_student(caplog: pytest.LogCaptureFixture) -> None:
    """2.3 and 6.1: named pkd_adapters.<level>, trainable, not zero; none where channels agree."""
    model = build(tiny.retinanet(), tiny.retinanet(channels=24), adapt="conv1x1", levels=(0, 2))
    extra = set(model.state_dict()) - set(MODELS.build(tiny.retinanet()).state_dict())
    assert extra == {"pkd_adapters.0.weight", "pkd_adapters.2.weight"}
    assert model.pkd_adapters["0"].weight.shape == (24, 16, 1, 1)
    assert float(model.pkd_adapters["0"].weight.abs().sum()) > 0
    with logged(caplog) as messages:
        same = build(tiny.retinanet(), tiny.retinanet(), adapt="conv1x1")
    assert not any("pkd" in name for name in same.state_dict())
    assert any("adds nothing: student and teacher have equal channels. Leave it out" in m for m in messages)


def test_adapters_need_channels_in_the_config() -> None:
    teacher = tiny.retinanet(neck={"type": "SomeNeck"})
    with pytest.raises(ValueError, match="the teacher's config has no neck.out_channels. Give it a neck"):
        build(tiny.retinanet(), teacher, adapt="conv1x1")
    Distiller(teacher=teacher, student=tiny.retinanet())


def test_stride_pairing_needs_one_channel_count() -> None:
    teacher = tiny.retinanet(neck={"type": "SomeNeck", "out_channels": [16, 16, 16, 24]})
    with pytest.raises(ValueError, match="needs one channel count for all levels.*Use pairing='index'"):
        build(tiny.retinanet(), teacher, pairing="stride")
    with pytest.raises(ValueError, match="level 3: the student's neck gives 16 channels, the teacher's 24"):
        build(tiny.retinanet(), teacher)


def test_student_must_be_a_supervised_detector() -> None:
    """6.1: semi-supervised detectors raise; a misspelt class gets the nearest name."""
    from mmdet.models.detectors import SoftTeacher

    with pytest.raises(ValueError, match="Did you mean 'RetinaNet'?"):
        PKDDetector("RetinaNt", {})
    with pytest.raises(ValueError, match="is no registered detector"):
        PKDDetector("ResNet", {})
    with pytest.raises(ValueError, match="Distil the detector under its `detector` key"):
        distilled_class(SoftTeacher)


def test_misspelt_student_option_is_not_swallowed() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'nek'"):
        build(tiny.retinanet(nek=1), tiny.retinanet())


def test_teacher_config_in_all_forms(tmp_path: Path) -> None:
    """A name of the wheel, a path, a whole config, a model dict; a top-level data_preprocessor counts."""
    assert teacher_model_config("mmdet::retinanet/retinanet_r18_fpn_1x_coco.py").type == "RetinaNet"
    path = tmp_path / "teacher.py"
    path.write_text(
        "data_preprocessor = dict(std=[2.0], mean=[1.0])\nmodel = dict(type='A', backbone=dict())\n"
    )
    assert teacher_model_config(path).data_preprocessor.mean == [1.0]
    assert teacher_model_config({"type": "B", "backbone": {}}).type == "B"
    assert teacher_model_config({"model": {"type": "C", "backbone": {}}}).type == "C"


def test_building_a_teacher_leaves_random_numbers_alone() -> None:
    """Fact 11 rests on it."""
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    build_teacher(tiny.retinanet())
    assert torch.equal(torch.rand(3), expected)


def test_deepcopy_shares_the_distiller() -> None:
    """Fact 13: EMA's deepcopy makes no second teacher."""
    model = build(tiny.retinanet(), tiny.retinanet())
    assert copy.deepcopy(model).pkd is model.pkd


# ---- one step --------------------------------------------------------------------------------------------


def test_losses_of_a_step(weights: Path) -> None:
    """2.6: loss_pkd_i is the weighted formula on neck outputs 0..3; r is logged under keys that are not
    summed."""
    model = build(tiny.retinanet(), tiny.retinanet(), weights)
    data = batch(model)
    model.eval()
    losses = model.loss(**{"batch_inputs": data["inputs"], "batch_data_samples": data["data_samples"]})
    teacher = build_teacher(tiny.retinanet())
    teacher.load_state_dict(
        {k: v for k, v in torch.load(weights)["state_dict"].items() if not k.startswith("bbox_head")}
    )
    with torch.no_grad():
        ours, theirs = model.extract_feat(data["inputs"]), teacher(data["inputs"])
    for level in range(4):
        expected = 10 * float(pkd_tensors(ours[level], theirs[level]))
        assert losses[f"loss_pkd_{level}"].item() == pytest.approx(expected, rel=1e-4)
        assert -1 <= losses[f"pkd/r_{level}"].item() <= 1
    assert losses["pkd/dead_channels"].item() == 0
    total, logged_values = model.parse_losses(losses)
    summed = (
        sum(losses[f"loss_pkd_{i}"] for i in range(4)) + sum(losses["loss_cls"]) + sum(losses["loss_bbox"])
    )
    assert total.item() == pytest.approx(summed.item(), rel=1e-6)
    assert "pkd/r_3" in logged_values
    assert not [name for name, _ in model.neck._forward_hooks.items()]


def test_all_student_parameters_get_gradients(weights: Path) -> None:
    """6.1: find_unused_parameters=False is right; the teacher gets none."""
    model = build(tiny.retinanet(), tiny.retinanet(), weights)
    data = batch(model)
    total, _ = model.parse_losses(model(**data, mode="loss"))
    total.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(p.grad is None for p in model.pkd.teacher.parameters())


def test_swin_teacher_by_index_and_by_stride(tmp_path: Path) -> None:
    """2.4: by index P3 is upsampled to P2; by stride nothing is resized. Fact 9: two passes are bit-equal
    although drop path is 0.2; in official mode they are not."""
    swin = tiny.swin_mask_rcnn()
    ckpt = tiny.write_weights(tmp_path / "swin.pth", swin)
    models = {
        mode: build(tiny.retinanet(), swin, ckpt, pairing=pairing, teacher_mode=mode)
        for mode, pairing in (("eval", "stride"), ("official", "index"))
    }
    data = batch(models["eval"])
    sizes = [(64, 64), (54, 44)]
    for mode, model in models.items():
        losses = model(**data, mode="loss")
        assert {f"loss_pkd_{i}" for i in range(4)} <= losses.keys()
        passes = [model.pkd.teacher_maps(data["inputs"], sizes) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*passes, strict=True)) == (mode == "eval")
    student_maps = models["eval"].extract_feat(data["inputs"])
    teacher_maps = models["eval"].pkd.teacher_maps(data["inputs"], sizes)
    assert models["eval"].pkd.pairs(student_maps, teacher_maps) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert models["official"].pkd.pairs(student_maps, teacher_maps) == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_levels_that_cannot_pair(weights: Path) -> None:
    """A student with P2 and a teacher that starts at P3."""
    model = build(tiny.faster_rcnn(), tiny.retinanet(), weights, pairing="stride")
    with pytest.raises(
        ValueError, match="Leave level 0 out of distill.levels, or set distill.pairing='index'"
    ):
        model(**batch(model), mode="loss")


def test_two_stage_student(weights: Path) -> None:
    """Faster R-CNN goes through the same loss(); levels 1..3 pair with the teacher's 0..2 by stride."""
    model = build(tiny.faster_rcnn(), tiny.retinanet(), weights, pairing="stride", levels=(1, 2, 3))
    losses = model(**batch(model), mode="loss")
    assert {"loss_rpn_cls", "loss_bbox", "loss_pkd_1", "loss_pkd_3"} <= losses.keys()
    assert "loss_pkd_0" not in losses


def test_teacher_of_another_input_format(tmp_path: Path) -> None:
    """Fact 16, through the detector: a caffe-style teacher sees what its own preprocessor gives."""
    caffe = tiny.retinanet(style="caffe")
    model = build(tiny.retinanet(), caffe, tiny.write_weights(tmp_path / "caffe.pth", caffe))
    raw = demo_mm_inputs(2, [[3, 64, 64], [3, 50, 44]], num_classes=2)
    own = MODELS.build(caffe["data_preprocessor"])(copy.deepcopy(raw), True)["inputs"]
    data = model.data_preprocessor(raw, True)
    seen: list[Tensor] = []
    model(**data, mode="loss")
    handle = model.pkd.teacher.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    model(**data, mode="loss")
    handle.remove()
    torch.testing.assert_close(seen[0], own, atol=1e-4, rtol=0)


def test_valid_mask_leaves_padding_out(weights: Path) -> None:
    """Level 0 of a batch whose second image is padded: the loss over valid positions only."""
    model = build(tiny.retinanet(), tiny.retinanet(), weights, valid_mask=True, levels=(0,))
    data = batch(model)
    sizes = [tuple(sample.metainfo["img_shape"][:2]) for sample in data["data_samples"]]
    assert sizes[1] != tuple(data["inputs"].shape[2:])
    losses = model.eval()(**data, mode="loss")
    with torch.no_grad():
        s = model.extract_feat(data["inputs"])[0]
        t = model.pkd.teacher_maps(data["inputs"], sizes)[0]
    # Centres at 4, 12, 20, ...: an image of 54 x 44 covers 7 of 8 rows (52 < 54) and 5 of 8 columns (36 <
    # 44).
    assert sizes[1] == (54, 44)
    keep = torch.zeros(2, 8, 8, dtype=torch.bool)
    keep[0] = True
    keep[1, :7, :5] = True
    flat_s, flat_t = (x.transpose(0, 1)[:, keep][None, :, None] for x in (s, t))
    expected = 10 * float(pkd_tensors(flat_s, flat_t))
    assert losses["loss_pkd_0"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("amp", ["bf16", None])
def test_teacher_precision_is_its_own(weights: Path, amp: str | None) -> None:
    """teacher_amp decides, not the autocast around the student."""
    model = build(tiny.retinanet(), tiny.retinanet(), weights, teacher_amp=amp)
    data = batch(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = model.pkd.teacher_maps(data["inputs"], [(64, 64)] * 2)
        losses = model(**data, mode="loss")
    assert maps[0].dtype == (torch.bfloat16 if amp else torch.float32)
    assert losses["loss_pkd_0"].dtype == torch.float32


def test_teacher_that_is_not_finite(tmp_path: Path) -> None:
    """Fact 7: the message names the level."""
    path = tiny.write_weights(tmp_path / "nan.pth", tiny.retinanet())
    content = torch.load(path)
    content["state_dict"]["neck.fpn_convs.1.conv.bias"][0] = float("nan")
    torch.save(content, path)
    model = build(tiny.retinanet(), tiny.retinanet(), path)
    with pytest.raises(
        ValueError, match="hold inf or NaN at: student level 1 / teacher level 1. Run the teacher"
    ):
        model(**batch(model), mode="loss")


def test_neck_must_run_once(weights: Path) -> None:
    class Twice(RetinaNet):
        def loss(self, batch_inputs: Tensor, batch_data_samples: list) -> dict:
            self.extract_feat(batch_inputs)
            return super().loss(batch_inputs, batch_data_samples)

    cfg = tiny.distilled(tiny.retinanet(), tiny.retinanet(), weights)
    model = MODELS.build(cfg | {"student_type": Twice})
    with pytest.raises(RuntimeError, match="ran its neck 2 times .*Distil a detector whose loss"):
        model(**batch(model), mode="loss")


def test_without_a_neck_the_backbone_is_tapped(tmp_path: Path) -> None:
    """6.1: maps of the backbone where there is no neck."""
    bare = tiny.retinanet(neck=None)
    bare["backbone"].update(out_indices=(1, 2, 3), base_channels=16, depth=18)
    bare["bbox_head"]["anchor_generator"]["strides"] = [8, 16, 32]
    bare["bbox_head"]["in_channels"] = 32

    class First(RetinaNet):
        def loss(self, batch_inputs: Tensor, batch_data_samples: list) -> dict:
            return {"loss_x": sum(x.mean() for x in self.extract_feat(batch_inputs))}

    ckpt = tiny.write_weights(tmp_path / "bare.pth", bare)
    cfg = tiny.distilled(bare, bare, ckpt, levels=(0, 2))
    model = MODELS.build(cfg | {"student_type": First})
    assert {"loss_x", "loss_pkd_0", "loss_pkd_2"} <= model(**batch(model), mode="loss").keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone.conv1.weight": None}, "1 missing .backbone.conv1.weight."),
        (
            {"neck.fpn_convs.0.conv.bias": torch.zeros(3)},
            "1 of another shape .neck.fpn_convs.0.conv.bias is .3,., needs .16,",
        ),
        (
            {"backbone.layer3.7.conv1.weight": torch.zeros(1)},
            "1 not in the model .backbone.layer3.7.conv1.weight.",
        ),
    ],
)
def test_checkpoint_of_another_architecture(
    tmp_path: Path, weights: Path, change: dict, message: str
) -> None:
    """6.1: one wrong backbone or neck key is enough; heads do not matter. Names, numbers and the mending."""
    content = torch.load(weights)
    content["state_dict"].update(change)
    content["state_dict"] = {
        name: value
        for name, value in content["state_dict"].items()
        if value is not None and not name.startswith("bbox_head")
    }
    path = tmp_path / "other.pth"
    torch.save(content, path)
    model = build(tiny.retinanet(), tiny.retinanet(), path)
    with pytest.raises(
        ValueError, match=f"of 136 backbone and neck keys: {message}.*Use the checkpoint that was"
    ):
        model.pkd.prepare(model)


def test_teacher_checkpoint_must_be_set() -> None:
    model = build(tiny.retinanet(), tiny.retinanet())
    with pytest.raises(ValueError, match="--cfg-options model.distill.teacher_ckpt=PATH"):
        model.pkd.prepare(model)


def test_inherit_starts_from_the_teacher(weights: Path) -> None:
    """2.5: neck and head take the teacher's values, the backbone does not."""
    model = build(tiny.retinanet(), tiny.retinanet(), weights, inherit=("neck", "bbox_head"))
    model.init_weights()
    taught = torch.load(weights)["state_dict"]
    equal = {name: torch.equal(value, taught[name]) for name, value in model.state_dict().items()}
    assert all(same for name, same in equal.items() if not name.startswith("backbone"))
    assert not equal["backbone.conv1.weight"]


def test_inherit_refuses_what_does_not_fit(weights: Path, tmp_path: Path) -> None:
    model = build(tiny.retinanet(), tiny.retinanet(), weights, inherit=("nekc",))
    with pytest.raises(ValueError, match="which the student does not have.*Did you mean 'neck'?"):
        model.init_weights()
    two_stage = tiny.write_weights(tmp_path / "frcnn.pth", tiny.faster_rcnn())
    model = build(tiny.retinanet(), tiny.faster_rcnn(), two_stage, inherit=("bbox_head",))
    with pytest.raises(
        ValueError, match="does not fit the student's: .*Leave 'bbox_head' out of distill.inherit"
    ):
        model.init_weights()


# ---- dry run and export ----------------------------------------------------------------------------------


def test_inspect_shows_the_pairs(tmp_path: Path, weights: Path) -> None:
    """Levels, strides, channels, resizing, weight and key coverage, without training."""
    swin = tiny.swin_mask_rcnn(channels=24)
    cfg = Config({"model": tiny.distilled(tiny.retinanet(), swin, adapt="conv1x1")})
    report = inspect_config(cfg)
    strides = [(plan.student_stride, plan.teacher_stride, plan.resized) for plan in report.levels]
    assert strides == [(8, 4, "student"), (16, 8, "student"), (32, 16, "student"), (64, 32, "student")]
    assert {(plan.student_channels, plan.teacher_channels, plan.adapted) for plan in report.levels} == {
        (16, 24, True)
    }
    assert (report.student, report.teacher, report.loss_weight) == ("RetinaNet", "MaskRCNN", 6.0)
    assert report.problems == ("teacher_ckpt is not set; give --cfg-options model.distill.teacher_ckpt=PATH",)

    cfg = Config({"model": tiny.distilled(tiny.retinanet(), tiny.retinanet(style="caffe"), weights)})
    report = inspect_config(cfg)
    assert report.problems == ()
    assert report.notes == (
        "images are mapped from the student's normalisation to the teacher's",
        f"teacher keys: all 136 fit ({weights})",
    )
    cfg.model.distill.update(teacher=tiny.faster_rcnn(), pairing="stride", levels=(1, 2, 3))
    with pytest.raises(ValueError, match="has no partner"):
        inspect_config(
            Config({"model": tiny.distilled(tiny.faster_rcnn(), tiny.retinanet(), pairing="stride")})
        )
    for ckpt, problem in (("gone.pth", "does not exist"), (weights, "not in the model")):
        cfg = Config({"model": tiny.distilled(tiny.retinanet(), tiny.swin_mask_rcnn(), ckpt)})
        assert problem in inspect_config(cfg).problems[0]
    url = "https://example.org/teacher.pth"
    cfg = Config({"model": tiny.distilled(tiny.retinanet(), tiny.retinanet(), url)})
    assert "nothing is downloaded here" in inspect_config(cfg).notes[0]


def test_inspect_tells_pad_divisors_and_unknown_channels() -> None:
    """Where a config does not state its channels, the dry run measures them."""
    student = tiny.retinanet()
    student["data_preprocessor"]["pad_size_divisor"] = 16
    bare = tiny.retinanet(neck=None)
    report = inspect_config(Config({"model": tiny.distilled(student, bare)}))
    assert any("multiples of 32; the student pads to 16" in note for note in report.notes)
    assert report.problems[0] == "level 0: 16 and 8 channels; set distill.adapt='conv1x1'"


def test_inspect_finds_the_hook_and_refuses_plain_configs() -> None:
    plain = Config({"model": tiny.retinanet()})
    with pytest.raises(ValueError, match="distils nothing.*Set model=dict.type='PKDDetector'"):
        distill_options(plain)
    plain.custom_hooks = [{"type": "Other"}, {"type": "PKDHook", "distill": {"teacher": "x"}}]
    assert distill_options(plain) == {"teacher": "x"}


def test_export_keeps_the_student_only() -> None:
    model = build(tiny.retinanet(), tiny.retinanet(channels=24), adapt="conv1x1")
    content = {"state_dict": model.state_dict(), "meta": {"epoch": 3}, "optimizer": {}, "message_hub": {}}
    student = export_student(content)
    assert student.keys() == {"state_dict", "meta"}
    plain = MODELS.build(tiny.retinanet())
    assert list(student["state_dict"]) == list(plain.state_dict())
    plain.load_state_dict(student["state_dict"])
    with pytest.raises(ValueError, match="Give a checkpoint that the Runner wrote"):
        export_student({"weights": 1})


# ---- inside the Runner -----------------------------------------------------------------------------------


@pytest.mark.host
def test_teacher_never_changes(lesson: Lesson, tmp_path: Path) -> None:
    """Fact 9: parameters and buffers bit-identical after training; eval everywhere after model.train()."""
    model = tiny.distilled(tiny.retinanet(), lesson.teacher, lesson.ckpt)
    runner = tiny.runner(model, lesson.data, tmp_path)
    runner.train()
    model = runner.model
    model.train()
    teacher = model.pkd.teacher
    assert not any(module.training for module in teacher.modules())
    saved = torch.load(lesson.ckpt, weights_only=False)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in teacher.state_dict().items())


@pytest.mark.host
def test_distillation_raises_the_correlation(lesson: Lesson, tmp_path: Path) -> None:
    """The health signal: after 8 epochs r of level 0 is far above where it began."""
    runner = tiny.runner(
        tiny.distilled(tiny.retinanet(), lesson.teacher, lesson.ckpt),
        lesson.data,
        tmp_path,
        train_cfg={"type": "EpochBasedTrainLoop", "max_epochs": 8, "val_interval": 100},
    )
    runner.train()
    history = runner.message_hub.get_scalar("train/pkd/r_0").data[0]
    assert history[-3:].mean() > history[:3].mean() + 0.15


@pytest.mark.host
def test_checkpoint_is_that_of_the_plain_student(lesson: Lesson, trained: Trained, tmp_path: Path) -> None:
    """Fact 10: same keys, no teacher, size within 1 % of a plain run, same metrics with the plain config."""
    ckpt = trained.work_dir / "epoch_2.pth"
    keys = torch.load(ckpt, weights_only=False)["state_dict"].keys()
    assert keys == torch.load(lesson.ckpt, weights_only=False)["state_dict"].keys()
    assert not any("teacher" in key for key in keys)
    assert ckpt.stat().st_size == pytest.approx(lesson.ckpt.stat().st_size, rel=0.01)
    metrics = []
    for name, model in {
        "plain": tiny.retinanet(),
        "distilled": tiny.distilled(tiny.retinanet(), lesson.teacher, "/does/not/exist"),
    }.items():
        runner = tiny.runner(model, lesson.data, tmp_path / name, load_from=str(ckpt))
        runner.load_or_resume()
        assert tiny.equal_states(runner.model.state_dict(), trained.weights)
        metrics.append(runner.test())
    assert "coco/bbox_mAP" in metrics[0]
    assert metrics[0] == metrics[1]


@pytest.mark.host
def test_zero_weight_is_plain_training(lesson: Lesson, tmp_path: Path) -> None:
    """Fact 11: load_from a plain checkpoint misses nothing, and loss_weight=0 follows the plain trajectory
    bit for bit."""
    states = []
    for name, model in {
        "plain": tiny.retinanet(),
        "zero": tiny.distilled(tiny.retinanet(), lesson.teacher, lesson.ckpt, loss={"loss_weight": 0.0}),
    }.items():
        runner = tiny.runner(model, lesson.data, tmp_path / name, load_from=str(lesson.ckpt))
        result = runner.model.load_state_dict(torch.load(lesson.ckpt, weights_only=False)["state_dict"])
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        runner.train()
        states.append(runner.model.state_dict())
    assert tiny.equal_states(*states)


@pytest.mark.host
def test_missing_teacher_stops_training_not_testing(lesson: Lesson, trained: Trained, tmp_path: Path) -> None:
    """Fact 12: testing never looks for the file; training fails before the first iteration with the path."""
    model = tiny.distilled(tiny.retinanet(), lesson.teacher, "/does/not/exist.pth")
    runner = tiny.runner(model, lesson.data, tmp_path, load_from=str(trained.work_dir / "epoch_2.pth"))
    assert isinstance(runner.test(), dict)
    assert runner.model.pkd.teacher is None
    with pytest.raises(
        FileNotFoundError, match="teacher_ckpt='/does/not/exist.pth' does not exist. Training needs it"
    ):
        runner.train()
    assert runner.iter == 0


@pytest.mark.host
def test_ema_shares_the_teacher_and_resumes(lesson: Lesson, tmp_path: Path) -> None:
    """Fact 13: one teacher in memory, validation leaves the raw weights alone, ema_state_dict resumes
    strictly."""
    ema = [{"type": "EMAHook", "momentum": 0.1, "strict_load": True}]
    model = tiny.distilled(tiny.retinanet(), lesson.teacher, lesson.ckpt)
    loop = {"type": "EpochBasedTrainLoop", "val_interval": 1}
    first = tiny.runner(
        model, lesson.data, tmp_path / "a", custom_hooks=ema, train_cfg={**loop, "max_epochs": 1}
    )
    first.train()
    hook = next(hook for hook in first.hooks if type(hook).__name__ == "EMAHook")
    assert hook.ema_model.module.pkd is first.model.pkd
    raw = copy.deepcopy(first.model.state_dict())
    first.val_loop.run()
    assert tiny.equal_states(first.model.state_dict(), raw)
    second = tiny.runner(
        model,
        lesson.data,
        tmp_path / "b",
        custom_hooks=ema,
        train_cfg={**loop, "max_epochs": 2},
        load_from=str(tmp_path / "a" / "epoch_1.pth"),
        resume=True,
    )
    second.train()
    whole = tiny.runner(
        model, lesson.data, tmp_path / "c", custom_hooks=ema, train_cfg={**loop, "max_epochs": 2}
    )
    whole.train()
    assert tiny.equal_states(second.model.state_dict(), whole.model.state_dict())


@pytest.mark.host
def test_resume_equals_an_uninterrupted_run(
    lesson: Lesson, trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Fact 14: 2 epochs == 1 epoch + resume, bit for bit; the teacher's fingerprint resumes without a
    warning."""
    model = tiny.distilled(tiny.retinanet(), lesson.teacher, lesson.ckpt)
    runner = tiny.runner(
        model, lesson.data, tmp_path, load_from=str(trained.work_dir / "epoch_1.pth"), resume=True
    )
    with logged(caplog) as messages:
        runner.train()
    assert tiny.equal_states(runner.model.state_dict(), trained.weights)
    assert not any("not those this run began with" in message for message in messages)


@pytest.mark.host
def test_other_teacher_at_resume_is_told(
    lesson: Lesson, trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """6.3: the hash of the teacher's weights is in the checkpoint; a change warns."""
    other = tiny.write_weights(tmp_path / "other.pth", lesson.teacher, seed=9)
    model = tiny.distilled(tiny.retinanet(), lesson.teacher, other)
    runner = tiny.runner(
        model, lesson.data, tmp_path, load_from=str(trained.work_dir / "epoch_1.pth"), resume=True
    )
    with logged(caplog) as messages:
        runner.train()
    told = [message for message in messages if "not those this run began with" in message]
    assert len(told) == 1
    assert "Resume with the same distill.teacher_ckpt, or start a new run" in told[0]


@OPTIM_WRAPPERS.register_module()
class CpuAmpWrapper(OptimWrapper):
    """mmengine's AmpOptimWrapper without its demand for a GPU: bf16 autocast around the student's step."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with torch.autocast("cpu", dtype=torch.bfloat16), super().optim_context(model):
            yield


@pytest.mark.host
def test_amp_trains(lesson: Lesson, tmp_path: Path) -> None:
    """Fact 8 in the Runner: the student under bf16 autocast; the loss falls and stays fp32."""
    optim = {"type": "CpuAmpWrapper", "optimizer": {"type": "SGD", "lr": 0.01}}
    model = tiny.distilled(tiny.retinanet(), lesson.teacher, lesson.ckpt)
    runner = tiny.runner(model, lesson.data, tmp_path, optim_wrapper=optim)
    dtypes: list[torch.dtype] = []
    runner.model.neck.register_forward_hook(lambda *args: dtypes.append(args[2][0].dtype))
    # oneDNN (3.12, in PyTorch 2.13) leaves parts of a weight gradient in bfloat16 as it found the memory,
    # for a 3x3 kernel of stride 2 on an input one pixel wide; P7 of images this small is such a layer.
    with torch.backends.mkldnn.flags(enabled=False):
        runner.train()
    assert set(dtypes[:3]) == {torch.bfloat16}
    history = runner.message_hub.get_scalar("train/loss_pkd_0").data[0]
    assert 0 < history[-1] < history[0]


@pytest.mark.host
@pytest.mark.parametrize(
    ("option", "distilled_steps"), [({"stop_epoch": 1}, 3), ({"stop_iter": 2}, 2)], ids=str
)
def test_stop_frees_the_teacher(
    lesson: Lesson, tmp_path: Path, option: dict[str, int], distilled_steps: int
) -> None:
    """6.3: after the stop no teacher, no r, and adapters keep a (zero) gradient for DDP. 6 images are 3 steps
    an epoch."""
    student = tiny.retinanet(channels=8)
    model = tiny.distilled(student, lesson.teacher, lesson.ckpt, adapt="conv1x1", **option)
    runner = tiny.runner(model, lesson.data, tmp_path)
    runner.train()
    assert runner.model.pkd.teacher is None
    assert len(runner.message_hub.get_scalar("train/pkd/r_0").data[0]) == distilled_steps
    losses = runner.message_hub.get_scalar("train/loss_pkd_0").data[0]
    assert [value > 0 for value in losses] == [step < distilled_steps for step in range(6)]
    total, _ = runner.model.parse_losses(runner.model(**batch(runner.model), mode="loss"))
    total.backward()
    assert float(runner.model.pkd_adapters["0"].weight.grad.abs().sum()) == 0


@pytest.mark.host
def test_weight_by_cfg_options(lesson: Lesson) -> None:
    """6.3: ``--cfg-options model.distill.loss.loss_weight=3`` with and without a loss block in the config."""
    for options in ({}, {"loss": {"type": "PKDLoss", "loss_weight": 10.0}}):
        cfg = Config({"model": tiny.distilled(tiny.retinanet(), lesson.teacher, **options)})
        cfg.merge_from_dict({"model.distill.loss.loss_weight": 3.0})
        assert MODELS.build(cfg.model).pkd.loss.loss_weight == 3.0


@pytest.mark.host
def test_init_detector(lesson: Lesson, trained: Trained, tmp_path: Path) -> None:
    """Fact 17: mmdet's own loader takes the distilled config, without the teacher's checkpoint."""
    model = tiny.distilled(tiny.retinanet(), lesson.teacher, "/does/not/exist.pth")
    cfg = tiny.config(model, lesson.data, tmp_path)
    detector = init_detector(cfg, str(trained.work_dir / "epoch_2.pth"), device="cpu")
    assert tiny.equal_states(detector.state_dict(), trained.weights)
    assert detector.dataset_meta["classes"] == tiny.CLASSES


@pytest.mark.host
@pytest.mark.parametrize(
    ("name", "weight", "student_strides", "teacher_stages"),
    [
        ("pkd_frcnn-r101_frcnn-r50_2x_coco", 6.0, "FasterRCNN", 2),
        ("pkd_mask-rcnn-swin-s_retinanet-r50_2x_coco", 6.0, "RetinaNet", 2),
        ("pkd_retinanet-x101_retinanet-r50_2x_coco", 10.0, "RetinaNet", 1),
        ("pkd_fcos-x101_retinanet-r50_1x_coco", 10.0, "RetinaNet", 1),
        ("pkd_reppoints-x101-dcn_reppoints-r50_2x_coco", 10.0, "RepPointsDetector", 1),
        ("pkd_mask-rcnn-swin-s_fcos-r50_2x_coco", 6.0, "FCOS", 2),
    ],
)
def test_official_pairs_build(name: str, weight: float, student_strides: str, teacher_stages: int) -> None:
    """Fact 17: weights, levels and learning rates of 2.5, from the configs of the installed wheel. The weight
    stated in each config is also what the rule would choose."""
    cfg = Config.fromfile(CONFIGS / f"{name}.py")
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model)
    assert model.pkd.loss.loss_weight == weight
    assert model.pkd.levels == (0, 1, 2, 3)
    assert model.pkd.adapted == {}
    assert type(model).__name__ == f"PKD{student_strides}"
    assert ("roi_head" in model.pkd.teacher_model) == (teacher_stages == 2)
    assert cfg.optim_wrapper.optimizer.lr == (0.02 if "frcnn-r50" in name else 0.01)
    assert cfg.train_cfg.max_epochs == (12 if "_1x_" in name else 24)
    del cfg.model.distill["loss"]
    assert Distiller(**cfg.model.distill, student=cfg.model).loss.loss_weight == weight


# ---- two processes ---------------------------------------------------------------------------------------


@pytest.mark.host
def test_two_processes_with_synced_statistics(lesson: Lesson, tmp_path: Path) -> None:
    """Fact 15: DDP on gloo with find_unused_parameters=False runs; with sync_stats value and gradients equal
    those of one process on the whole batch (to 1e-6 of the gradient's length)."""
    import socket

    import torch.multiprocessing as mp

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(two_processes.worker, (port, str(tmp_path), str(lesson.ckpt), str(lesson.data)), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2)]
    assert [rank["steps"] for rank in ranks] == [2, 2]

    torch.manual_seed(0)
    model = build(two_processes.student(), tiny.retinanet(), lesson.ckpt, loss={"loss_weight": 6.0})
    images, samples = two_processes.shared_batch(model.train())
    losses = model(images, samples, mode="loss")
    total = sum(value for name, value in losses.items() if "loss_pkd" in name)
    total.backward()
    for rank in ranks:
        assert rank["loss"] == pytest.approx(total.item(), rel=1e-6)
        pairs = [(rank["grads"][name], p.grad) for name, p in model.named_parameters() if p.grad is not None]
        ours, alone = (torch.cat([x.flatten() for x in side]) for side in zip(*pairs, strict=True))
        # One vector, as the biases just before the standardisation have a true gradient of zero.
        assert float((ours - alone).norm() / alone.norm()) < 1e-6
