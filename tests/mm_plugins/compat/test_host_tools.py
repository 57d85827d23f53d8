"""``tools/mm.py`` finds mmdet's and mmseg's own scripts and runs them unchanged."""

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mm_plugins  # noqa: F401
from mm_plugins.compat.host_tools import config_scope, host_script, main

ROOT = Path(__file__).resolve().parents[3]
TINY = """
_base_ = [{base!r}]
train_dataloader = dict(batch_size=2, dataset=dict(data_root={data!r}, indices=4))
val_dataloader = dict(batch_size=2, dataset=dict(data_root={data!r}, indices=2))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file={data!r} + "val.json")
test_evaluator = val_evaluator
model = dict(backbone=dict(base_channels=8), neck=dict(in_channels=[8, 16, 32, 64]))
train_cfg = dict(max_epochs=1, val_interval=5)
default_hooks = dict(logger=dict(interval=1))
env_cfg = dict(dist_cfg=dict(backend="gloo"))
"""


@pytest.fixture
def tiny_config(tmp_path: Path) -> Path:
    """The blood-cell RetinaNet at eighth width on four images."""
    path = tmp_path / "tiny.py"
    base, data = ROOT / "configs/pkd/retinanet_r18_bccd.py", f"{ROOT}/tests/data/bccd/"
    path.write_text(TINY.format(base=str(base), data=data))
    return path


@pytest.mark.parametrize("scope", ["mmdet", "mmseg"])
@pytest.mark.parametrize("task", ["train", "test"])
def test_scripts_are_the_hosts_own(scope: str, task: str) -> None:
    script = host_script(scope, task)
    assert script.parts[-4:] == (scope, ".mim", "tools", f"{task}.py")
    assert "OpenMMLab" in script.read_text().splitlines()[0]


def test_unknown_scope_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="must be one of .*Set default_scope in the"):
        host_script("mmpose", "train")


def test_missing_host_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "mmhf-plugins\[mm\]"'):
        host_script("mmseg", "train")


def test_host_without_tools_says_reinstall(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = importlib.machinery.ModuleSpec("mmseg", None, origin=str(tmp_path / "mmseg" / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ImportError, match="installed without its tools"):
        host_script("mmseg", "train")


def test_missing_config_lists_near_names(tmp_path: Path) -> None:
    (tmp_path / "retinanet.py").write_text("default_scope = 'mmdet'")
    with pytest.raises(FileNotFoundError, match=r"does not exist.*Did you mean retinanet.py"):
        config_scope(str(tmp_path / "retinanett.py"))


def test_config_without_scope_says_what_to_add(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("model = dict(type='X')")
    with pytest.raises(ValueError, match="sets no default_scope.*Add default_scope"):
        config_scope(str(tmp_path / "x.py"))


@pytest.mark.parametrize("argv", [[], ["trian", "x.py"], ["train"], ["train", "nowhere.py"]])
def test_wrong_use_exits_2(argv: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert "usage" in printed.out + printed.err or "does not exist" in printed.err


def _run(words: list[str], cwd: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


@pytest.mark.host
def test_train_resume_and_test_through_mmdets_own_scripts(tiny_config: Path, tmp_path: Path) -> None:
    mm, work_dir = str(ROOT / "tools/mm.py"), str(tmp_path / "run")
    _run([sys.executable, mm, "train", str(tiny_config), "--work-dir", work_dir], tmp_path)
    assert (tmp_path / "run/epoch_1.pth").is_file()
    longer = ["--resume", "--cfg-options", "train_cfg.max_epochs=2"]
    log = _run([sys.executable, mm, "train", str(tiny_config), "--work-dir", work_dir, *longer], tmp_path)
    assert "resumed epoch: 1" in log
    log = _run(
        [sys.executable, mm, "test", str(tiny_config), f"{work_dir}/epoch_2.pth", "--work-dir", work_dir],
        tmp_path,
    )
    assert "Epoch(test) [1/1]" in log


@pytest.mark.host
def test_two_processes_under_torch_distributed_run(tiny_config: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(ROOT / "tools/mm.py"), "train", str(tiny_config), "--launcher", "pytorch"]
    log = _run([*launch, *script, "--work-dir", str(tmp_path / "run")], tmp_path)
    assert "Distributed training: True" in log
    assert "GPU number: 2" in log
    assert (tmp_path / "run/epoch_1.pth").is_file()
