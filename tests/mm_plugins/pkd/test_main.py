"""The two commands, called as a user would."""

from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS

from mm_plugins.pkd.__main__ import main
from tests.mm_plugins.pkd import tiny


def dump(path: Path, model: dict) -> str:
    tiny.config(model, path.parent, path.parent).dump(path)
    return str(path)


def test_inspect_prints_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0 if all fits, 1 if training would stop; --cfg-options reach the distill block."""
    config = dump(tmp_path / "config.py", tiny.distilled(tiny.retinanet(), tiny.retinanet()))
    assert main(["inspect", config]) == 1
    assert "PROBLEM  teacher_ckpt is not set" in capsys.readouterr().out
    ckpt = tiny.write_weights(tmp_path / "teacher.pth", tiny.retinanet())
    options = [f"model.distill.teacher_ckpt={ckpt}", "model.distill.loss.loss_weight=2.5"]
    assert main(["inspect", config, "--cfg-options", *options]) == 0
    out = capsys.readouterr().out
    assert "weight 2.5 on each of 4 levels" in out
    assert "all 136 fit" in out


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dump(tmp_path / "plain.py", tiny.retinanet())
    assert main(["inspect", config]) == 2
    assert "error: the config distils nothing" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "gone.pth"), str(tmp_path / "out.pth")]) == 2
    assert "gone.pth" in capsys.readouterr().err


def test_export_writes_a_plain_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loads strictly into the plain student; adapters and optimizer are gone; an existing file is left
    alone."""
    torch.manual_seed(0)
    model = MODELS.build(tiny.distilled(tiny.retinanet(), tiny.retinanet(channels=24), adapt="conv1x1"))
    source, out = tmp_path / "epoch_1.pth", tmp_path / "new" / "student.pth"
    content = {"state_dict": model.state_dict(), "optimizer": {"state": {}}, "meta": {"dataset_meta": {}}}
    torch.save(content, source)
    assert main(["export", str(source), str(out)]) == 0
    assert "student.pth" in capsys.readouterr().out
    written = torch.load(out)
    assert written.keys() == {"state_dict", "meta"}
    plain = MODELS.build(tiny.retinanet())
    plain.load_state_dict(written["state_dict"])
    assert torch.equal(plain.neck.fpn_convs[0].conv.weight, model.neck.fpn_convs[0].conv.weight)
    before = out.read_bytes()
    assert main(["export", str(source), str(out)]) == 2
    assert "exists. Remove it, or give another name" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_export_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up: neither the file nor a rest of it."""
    source = tmp_path / "epoch_1.pth"
    torch.save({"state_dict": {"a": torch.zeros(1)}}, source)

    def fail(_content: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    assert main(["export", str(source), str(tmp_path / "out.pth")]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_1.pth"]
