"""The demo: its plan, its words, and (slow) the whole of it at two epochs."""

import json
from pathlib import Path

import pytest

from tools import demo

ROOT = Path(__file__).resolve().parents[2]


def test_distilled_students_use_the_teachers_last_checkpoint(tmp_path: Path) -> None:
    runs = demo.plan(tmp_path, teacher_epochs=4, student_epochs=2)
    assert list(runs) == [demo.TEACHER, demo.PLAIN, demo.PKD, demo.MSE]
    wanted = f"model.distill.teacher_ckpt={tmp_path / 'teacher' / 'epoch_4.pth'}"
    assert wanted in runs[demo.PKD].overrides()
    assert wanted in runs[demo.MSE].overrides()
    assert runs[demo.PLAIN].overrides() == ["train_cfg.max_epochs=2", "param_scheduler.0.total_steps=2"]
    assert len({run.work_dir for run in runs.values()}) == 4


def test_gain_is_counted_from_the_plain_student(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """mAP .20 plain and .25 with PKD: a gain of +5.0 points; teacher and plain show none."""
    scores = {"teacher": 0.3, "retinanet": 0.2, "pkd": 0.25, "mse": 0.15}
    monkeypatch.setattr(
        demo, "validation", lambda path: {2: {"bbox_mAP": scores[path.name], "bbox_mAP_50": 0.5}}
    )
    columns, rows = demo.summary(demo.plan(tmp_path, teacher_epochs=2, student_epochs=2))
    assert [row[2] for row in rows] == ["30.0", "20.0", "25.0", "15.0"]
    assert [row[4] for row in rows] == ["", "", "+5.0", "-5.0"]
    lines = demo.text_table(columns, rows).splitlines()
    assert (
        len(
            {line.index(cell) for line, cell in zip(lines[1:], ["30.0", "20.0", "25.0", "15.0"], strict=True)}
        )
        == 1
    )


@pytest.mark.parametrize("option", ["--teacher-epochs", "--student-epochs"])
def test_odd_epochs_are_refused_before_any_training(option: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        demo.main([option, "3"])
    assert "must be even and at least 2" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.real
def test_whole_demo_at_two_epochs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Four trainings, the page with every picture inside, and a second run that trains nothing."""
    arguments = ["--out", str(tmp_path), "--teacher-epochs", "2", "--student-epochs", "2"]
    assert demo.main(arguments) == 0
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/jpeg;base64,") == demo.NUM_PICTURES * 5
    assert "http" not in page.replace("http://www.w3.org", "")
    assert demo.main(arguments) == 0
    assert capsys.readouterr().out.count("finished before, kept") == 4


@pytest.mark.real
@pytest.mark.parametrize(("split", "num_images", "num_boxes"), [("train", 205, 2804), ("val", 87, 1137)])
def test_blood_cells_are_complete(split: str, num_images: int, num_boxes: int) -> None:
    """The counts that the source states, boxes inside their images, and every image there."""
    folder = ROOT / "tests" / "data" / "bccd"
    data = json.loads((folder / f"{split}.json").read_text())
    assert (len(data["images"]), len(data["annotations"])) == (num_images, num_boxes)
    assert all((folder / image["file_name"]).is_file() for image in data["images"])
    for x, y, width, height in (annotation["bbox"] for annotation in data["annotations"]):
        assert width > 0
        assert height > 0
        assert 0 <= x <= x + width <= 320.5
        assert 0 <= y <= y + height <= 240.5
