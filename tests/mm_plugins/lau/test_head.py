"""Every head with LaU: sizes, losses, what the host sees (acceptance fact 12)."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import mmseg.models.decode_heads as hosts
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmseg.models.decode_heads import DAHead, FCNHead, PointHead, SegmenterMaskTransformerHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS

from mm_plugins.lau import LaUHead, LaUMixin, wrap_head
from mm_plugins.lau.head import BASES, reduce_label, why_unfit
from mm_plugins.lau.location_loss import pixel_loss
from tests.mm_plugins.lau import tiny

REG = {"loss": {"mode": "reg", "lambda_": 0.3, "gamma": 0.1}}


def run(head: Any, base: str, side: int = 24, *, previous: bool = False) -> dict:
    """Losses of one batch."""
    inputs = [tiny.features(base)]
    if previous:
        inputs.append(torch.randn(2, 3, 12, 12))
    out = head.forward(*inputs)
    return head.loss_by_feat(out, tiny.samples(side))


@pytest.mark.parametrize("base", BASES)
def test_every_named_head_is_k_times_larger_and_learns(base: str) -> None:
    """The same weights without LaU give logits k times smaller; all LaU parameters get a gradient."""
    torch.manual_seed(0)
    head, plain = tiny.head(base, REG), tiny.plain_head(base)
    missing = plain.load_state_dict(head.state_dict(), strict=False)
    assert not missing.missing_keys
    assert all(key.startswith("lau.") for key in missing.unexpected_keys)
    inputs = [tiny.features(base), *([torch.randn(2, 3, 12, 12)] if base == "OCRHead" else [])]
    with torch.no_grad():
        small = plain.forward(*inputs)
    out = head.forward(*inputs)
    logits = out[0] if isinstance(out, tuple) else out
    low = small[0] if isinstance(small, tuple) else small
    assert logits.shape[2:] == (2 * low.shape[2], 2 * low.shape[3])
    losses = head.loss_by_feat(out, tiny.samples(24))
    assert {"loss_ce", "loss_lau_reg", "lau_offset_abs", "lau_moved_frac"} <= set(losses)
    tiny.summed(losses).backward()
    assert all(p.grad is not None for p in head.lau.parameters())
    assert head.conv_seg.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", [name for name in hosts.__all__ if name not in BASES])
def test_other_heads_are_refused_with_a_reason(name: str) -> None:
    base = getattr(hosts, name)
    with pytest.raises(ValueError, match=f"LaU cannot wrap {name}: .*Heads that fit: ANNHead"):
        wrap_head(base)


def test_reasons() -> None:
    class Twice(FCNHead):
        def forward(self, inputs: Any) -> Any:
            return super().forward(inputs)

    assert why_unfit(torch.nn.Conv2d) == "it is no BaseDecodeHead"
    assert "overrides cls_seg" in why_unfit(PointHead)
    assert "its own loss" in why_unfit(DAHead)
    assert "never calls cls_seg" in why_unfit(SegmenterMaskTransformerHead)
    assert "never calls cls_seg" in why_unfit(Twice)
    assert "wrapped already" in why_unfit(wrap_head(FCNHead))


def test_lau_head_takes_the_base_by_name() -> None:
    init_default_scope("mmseg")
    options = copy.deepcopy(tiny.HEADS["FCNHead"])
    built = MODELS.build({"type": "LaUHead", "base": "FCNHead", "lau": {"scale_factor": 2}, **options})
    assert isinstance(built, LaUMixin)
    assert isinstance(built, FCNHead)
    with pytest.raises(ValueError, match="FCMHead.* is no registered head"):
        LaUHead(base="FCMHead", lau={})
    with pytest.raises(TypeError, match="scale_facto"):
        LaUHead(base="FCNHead", lau={"scale_facto": 2}, **options)


def test_zero_offsets_on_the_half_pixel_grid_are_the_plain_head() -> None:
    """Every loss and the prediction equal mmseg's own bilinear enlargement: the control of experiments."""
    torch.manual_seed(0)
    head = tiny.head("FCNHead", {"branch": "zero"}, dropout_ratio=0.0)
    plain = tiny.plain_head("FCNHead", dropout_ratio=0.0)
    plain.load_state_dict(head.state_dict())
    ours, theirs = run(head, "FCNHead"), run(plain, "FCNHead")
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, atol=1e-5, rtol=1e-5)


def test_losses_by_hand() -> None:
    """reg: mean(L * Lambda) over all pixels, and gamma * smooth L1; weights and own loss of the same step."""
    torch.manual_seed(0)
    head = tiny.head("FCNHead", {**REG, "init": "xavier"}, dropout_ratio=0.0)
    seen = {}

    def keep(_: Any, args: tuple, kwargs: dict, out: Any) -> None:
        seen.update(args=args, terms=out)

    head.location_loss.register_forward_hook(keep, with_kwargs=True)
    losses = run(head, "FCNHead")
    terms, own = seen["terms"], seen["args"][2]
    torch.testing.assert_close(losses["loss_ce"], (own * terms.weight).mean())
    assert losses["loss_lau_reg"] is terms.regression
    assert losses["lau_moved_frac"] is terms.moved
    assert 1 < terms.weight.max() <= 1.3 + 1e-6
    torch.testing.assert_close(losses["lau_offset_abs"], seen["args"][1].abs().mean())


@pytest.mark.parametrize("mode", ["off", "reg"])
def test_loss_at_the_labels_resolution(mode: str) -> None:
    """label: logits and weights are brought to the labels; twice the size repeats every weight 2x2."""
    torch.manual_seed(0)
    lau = {"loss": {"mode": mode}, "loss_resolution": "label", "init": "xavier"}
    head = tiny.head("FCNHead", lau, dropout_ratio=0.0)
    seen = {}
    head.location_loss.register_forward_hook(lambda _, args, out: seen.update(args=args, terms=out))
    out = head.forward(tiny.features("FCNHead"))
    data = tiny.samples(48)
    losses = head.loss_by_feat(out, data)
    label = torch.stack([sample.gt_sem_seg.data for sample in data])
    large = F.interpolate(out, size=(48, 48), mode="bilinear", align_corners=False)
    weight = seen["terms"].weight.repeat_interleave(2, 1).repeat_interleave(2, 2)
    wanted = (pixel_loss(large, label[:, 0]) * weight).mean()
    torch.testing.assert_close(losses["loss_ce"], wanted)
    assert torch.equal(seen["args"][3], label[:, 0, ::2, ::2])
    assert ("loss_lau_reg" in losses) == (mode == "reg")


def test_se_loss_sees_the_labels_as_they_are() -> None:
    """A class of one pixel that nearest neighbour drops is still present for EncHead's second loss."""
    torch.manual_seed(0)
    head = tiny.head("EncHead", REG, dropout_ratio=0.0)
    plain = tiny.plain_head("EncHead", dropout_ratio=0.0)
    plain.load_state_dict(head.state_dict(), strict=False)
    data = tiny.samples(48, num_classes=2, ignored=0)
    data[0].gt_sem_seg.data[0, 5, 5] = 2
    assert not (reduce_label(torch.stack([d.gt_sem_seg.data for d in data]), (24, 24)) == 2).any()
    losses = [h.loss_by_feat(h.forward(tiny.features("EncHead")), data) for h in (head, plain)]
    torch.testing.assert_close(losses[0]["loss_se"], losses[1]["loss_se"])
    se = [h.forward(tiny.features("EncHead"))[1] for h in (head, plain)]
    torch.testing.assert_close(se[0], se[1])


@pytest.mark.parametrize("loss", [None, {"mode": "reg"}, {"mode": "off"}])
@pytest.mark.parametrize("avg_non_ignore", [False, True])
def test_fused_loss_equals_the_plain_one(loss: dict | None, avg_non_ignore: bool) -> None:
    torch.manual_seed(0)
    decode = {"type": "CrossEntropyLoss", "loss_weight": 0.7, "avg_non_ignore": avg_non_ignore}
    results = []
    state = None
    for fused in (False, True):
        lau = {"loss": loss, "fused": fused, "init": "xavier"}
        head = tiny.head("FCNHead", lau, dropout_ratio=0.0, loss_decode=decode)
        state = state or head.state_dict()
        head.load_state_dict(state)
        losses = run(head, "FCNHead", side=48)
        tiny.summed(losses).backward()
        results.append((losses, {name: p.grad for name, p in head.named_parameters()}))
    assert set(results[0][0]) == set(results[1][0])
    for key, value in results[0][0].items():
        torch.testing.assert_close(results[1][0][key].float(), value.float().squeeze(), atol=1e-4, rtol=1e-4)
    for key, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][key], value, atol=1e-5, rtol=1e-3)
    head.eval()
    assert head.forward(tiny.features("FCNHead")).shape[2:] == (24, 24)


def test_fused_loss_refuses_what_it_cannot_stand_for() -> None:
    dice = {"type": "DiceLoss"}
    with pytest.raises(
        ValueError, match="lau.fused=True does not fit this head: .*loss_decode must be one softmax"
    ):
        tiny.head("FCNHead", {"fused": True}, loss_decode=dice)
    with pytest.raises(ValueError, match="loss_resolution must be 'lau'"):
        tiny.head("FCNHead", {"fused": True, "loss_resolution": "label"})
    with pytest.raises(ValueError, match="no further loss"):
        tiny.head("EncHead", {"fused": True})
    with pytest.raises(ValueError, match="num_groups must be 1"):
        tiny.head("FCNHead", {"fused": True, "num_groups": 3})
    with pytest.raises(ValueError, match="backend must be one of auto, rows, triton"):
        tiny.head("FCNHead", {"fused": True, "backend": "grid_sample"})
    ohem = {"type": "OHEMPixelSampler", "thresh": 0.7, "min_kept": 10}
    with pytest.raises(ValueError, match="no pixel sampler"):
        tiny.head("FCNHead", {"fused": True, **REG}, sampler=ohem)


def test_a_samplers_own_weights_still_apply() -> None:
    """OHEM keeps few pixels; their weights are multiplied with Lambda."""
    torch.manual_seed(0)
    ohem = {"type": "OHEMPixelSampler", "min_kept": 20}
    head = tiny.head("FCNHead", {**REG, "init": "xavier"}, sampler=ohem, dropout_ratio=0.0)
    seen = {}
    head.location_loss.register_forward_hook(lambda _, args, out: seen.update(own=args[2], terms=out))
    losses = run(head, "FCNHead")
    own, weight = seen["own"].flatten(), seen["terms"].weight.flatten()
    kept = own.argsort(descending=True)[:40]
    torch.testing.assert_close(losses["loss_ce"], (own * weight)[kept].sum() / own.numel())


def test_binary_head_with_one_logit() -> None:
    torch.manual_seed(0)
    sigmoid = {"type": "CrossEntropyLoss", "use_sigmoid": True}
    head = tiny.head("FCNHead", REG, num_classes=2, out_channels=1, threshold=0.5, loss_decode=sigmoid)
    out = head.forward(tiny.features("FCNHead"))
    losses = head.loss_by_feat(out, tiny.samples(24, num_classes=2))
    assert out.shape == (2, 1, 24, 24)
    assert losses["loss_lau_reg"] > 0


def test_wrong_options_are_named() -> None:
    with pytest.raises(ValueError, match="lau.loss_resolution must be 'lau' or 'label'; got 'full'"):
        tiny.head("FCNHead", {"loss_resolution": "full"})
    with pytest.raises(ValueError, match="lau.loss must be a LocationAwareLoss; got DiceLoss"):
        tiny.head("FCNHead", {"loss": {"type": "DiceLoss"}})
    sigmoid = {"type": "CrossEntropyLoss", "use_sigmoid": True}
    with pytest.raises(ValueError, match=r"loss_decode has use_sigmoid=True with 3 outputs"):
        tiny.head("FCNHead", REG, loss_decode=sigmoid)
    with pytest.raises(TypeError, match="mid_channel"):
        tiny.head("FCNHead", {"mid_channel": 3})


def test_a_head_that_classifies_twice_is_found_out() -> None:
    class TwiceHead(FCNHead):
        def forward(self, inputs: Any) -> Any:
            return self.cls_seg(self._forward_feature(inputs)) + self.cls_seg(self._forward_feature(inputs))

    head = wrap_head(TwiceHead)(lau={"scale_factor": 2}, **copy.deepcopy(tiny.HEADS["FCNHead"])).train()
    out = head.forward(tiny.features("FCNHead"))
    with pytest.raises(RuntimeError, match="called cls_seg 2 times in one training step"):
        head.loss_by_feat(out, tiny.samples(24))


def test_initialised_heads_keep_small_offsets() -> None:
    """The host's init_weights reaches the branch and does not make it large."""
    head = tiny.head("FCNHead")
    head.init_weights()
    assert 0 < head.lau.branch.vertical[2].weight.std() < 2e-3


def test_plain_checkpoint_leaves_only_lau_missing() -> None:
    """Fact 12: an EncNet checkpoint goes in, and only decode_head.lau.* is new."""
    head, plain = tiny.head("EncHead"), tiny.plain_head("EncHead")
    found = head.load_state_dict(plain.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert found.missing_keys
    assert all(key.startswith("lau.") for key in found.missing_keys)


def test_optimizer_groups_follow_the_longest_key() -> None:
    """decode_head.lau: weight decay 0 and ten times the rate; decode_head alone would win over "lau"."""
    from mmengine.optim import build_optim_wrapper

    model = tiny.segmentor()
    keys = {
        "decode_head": {"lr_mult": 10.0},
        "decode_head.lau": {"lr_mult": 10.0, "decay_mult": 0.0},
    }
    wrapper = build_optim_wrapper(
        model,
        {
            "type": "OptimWrapper",
            "optimizer": {"type": "SGD", "lr": 0.01, "weight_decay": 1e-4},
            "paramwise_cfg": {"custom_keys": keys},
        },
    )
    owner = {id(p): name for name, p in model.named_parameters()}
    groups = {owner[id(g["params"][0])]: (g["lr"], g["weight_decay"]) for g in wrapper.optimizer.param_groups}
    lau = {value for name, value in groups.items() if ".lau." in name}
    head = {value for name, value in groups.items() if "decode_head.conv" in name}
    assert lau == {(0.1, 0.0)}
    assert head == {(0.1, 1e-4)}


def predict(model: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.predict(image, tiny.samples(tuple(image.shape[2:])))[0].seg_logits.data


def test_slide_equals_whole_when_the_window_covers_the_image() -> None:
    image = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    model = tiny.segmentor()
    whole = predict(model, image)
    model.test_cfg = Config({"mode": "slide", "crop_size": (64, 96), "stride": (32, 48)})
    torch.testing.assert_close(predict(model, image), whole)
    model.test_cfg = Config({"mode": "slide", "crop_size": (48, 64), "stride": (16, 32)})
    assert predict(model, image).shape == whole.shape == (2, 64, 96)


def test_tensor_mode_gives_k_times_and_predict_the_original_size() -> None:
    model = tiny.segmentor(**{"model.decode_head.lau.scale_factor": 4})
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert model(image, mode="tensor").shape == (2, 2, 32, 48)
    data = tiny.samples((64, 96))
    for sample in data:
        sample.set_metainfo({"ori_shape": (50, 70), "padding_size": [0, 0, 0, 0]})
    with torch.no_grad():
        found = model.predict(image, data)
    assert found[0].pred_sem_seg.data.shape == (1, 50, 70)


def test_model_in_bf16_autocast_keeps_offsets_fp32() -> None:
    model = tiny.segmentor().train()
    offsets = []
    model.decode_head.lau.branch.register_forward_hook(lambda _, __, out: offsets.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model.loss(torch.randn(2, 3, 64, 64), tiny.samples(64, num_classes=2))
    tiny.summed(losses).backward()
    assert offsets == [torch.float32]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.host
def test_exported_model_equals_the_eager_one() -> None:
    model = tiny.segmentor()
    image = torch.randn(1, 3, 64, 64)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x, mode="tensor")

    with torch.no_grad():
        program = torch.export.export(Logits().eval(), (image,))
        torch.testing.assert_close(program.module()(image), Logits()(image), atol=1e-4, rtol=1e-4)
    assert any("grid_sampler" in str(node.target) for node in program.graph.nodes)


@pytest.mark.host
def test_the_runner_trains_resumes_and_tests(tmp_path: Path) -> None:
    """Two epochs on real nuclei with EMA, the same run resumed for a third, then a test with flips."""
    changes = {
        "train_cfg.max_epochs": 2,
        "train_cfg.val_interval": 2,
        "default_hooks.checkpoint.interval": 1,
        "work_dir": str(tmp_path),
    }
    config = tiny.config(**changes)
    config.custom_hooks = [{"type": "EMAHook"}]
    runner = Runner.from_cfg(config)
    runner.train()
    assert runner.iter == 4
    logged = runner.message_hub.log_scalars
    assert {"train/decode.loss_ce", "train/decode.loss_lau_reg", "train/decode.lau_moved_frac"} <= set(logged)
    assert {"val/mIoU", "val/mBIoU"} <= set(logged)
    total = logged["train/loss"].current()
    parts = [logged[f"train/decode.{name}"].current() for name in ("loss_ce", "loss_lau_reg")]
    assert total == pytest.approx(sum(parts), rel=1e-5)
    config.merge_from_dict({"train_cfg.max_epochs": 3, "resume": True})
    resumed = Runner.from_cfg(config)
    resumed.train()
    assert resumed.iter == 6
    # What mmseg's own test.py does for --tta.
    config = tiny.config(load_from=str(tmp_path / "epoch_3.pth"), work_dir=str(tmp_path / "tta"))
    config.test_dataloader.dataset.pipeline = config.tta_pipeline
    config.model = {"type": "SegTTAModel", "module": config.model}
    assert 0 < Runner.from_cfg(config).test()["mIoU"] <= 100


WORKER = """
import os, sys, torch
sys.path.insert(0, {root!r})
from tests.mm_plugins.lau import tiny
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
rank = int(sys.argv[1])
os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2])
dist.init_process_group("gloo", rank=rank, world_size=2)
torch.set_num_threads(1)
options = {{"model.decode_head.dropout_ratio": 0.0, "model.backbone.norm_eval": True}}
model = tiny.segmentor(**options).train()
model.decode_head.eval()
model.decode_head.training = True
wrapped = DistributedDataParallel(model)
images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))
samples = tiny.samples(64, num_classes=2)
losses = wrapped(images[rank:rank + 1], samples[rank:rank + 1], mode="loss")
tiny.summed(losses).backward()
torch.save({{n: p.grad for n, p in model.named_parameters()}}, sys.argv[3] + f"/rank{{rank}}.pth")
dist.destroy_process_group()
"""


@pytest.mark.host
def test_two_processes_equal_one_on_the_whole_batch(tmp_path: Path) -> None:
    """DDP without find_unused_parameters: every parameter takes part; means of halves are the mean."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    code = WORKER.format(root=str(tiny.ROOT))
    command = [sys.executable, "-c", code]
    processes = [
        subprocess.Popen([*command, str(rank), port, str(tmp_path)], cwd=tiny.ROOT, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()[-2000:]
    options = {"model.decode_head.dropout_ratio": 0.0, "model.backbone.norm_eval": True}
    model = tiny.segmentor(**options).train()
    # The head's norms keep their statistics, so that two halves can equal the whole.
    model.decode_head.eval()
    model.decode_head.training = True
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    tiny.summed(model.loss(images, tiny.samples(64, num_classes=2))).backward()
    for rank in range(2):
        grads = torch.load(tmp_path / f"rank{rank}.pth")
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad, atol=1e-6, rtol=1e-3)


CONFIG_FILES = sorted(path.name for path in tiny.CONFIGS.glob("*.py"))


@pytest.mark.host
@pytest.mark.parametrize("name", CONFIG_FILES)
def test_every_config_builds_its_head(name: str) -> None:
    """The decode head of each shipped config, without the backbone; configs on top of mmseg's wheel too."""
    init_default_scope("mmseg")
    config = Config.fromfile(tiny.CONFIGS / name)
    assert config.default_scope == "mmseg"
    head = MODELS.build(config.model.decode_head)
    assert isinstance(head, BaseDecodeHead)
    if "lau" in name:
        assert isinstance(head, LaUMixin)
        keys = config.optim_wrapper.get("paramwise_cfg", {}).get("custom_keys", {})
        assert keys["decode_head.lau"]["decay_mult"] == 0.0
