"""The dry run's text."""

from mm_plugins.pkd.report import InspectReport, LevelPlan, format_report


def test_text_says_it_all() -> None:
    """One line a level, then notes, then problems."""
    plan = LevelPlan(
        student_level=0,
        teacher_level=1,
        student_stride=8,
        teacher_stride=4,
        student_channels=64,
        teacher_channels=256,
        resized="student",
        adapted=True,
    )
    report = InspectReport(
        student="FCOS",
        teacher="MaskRCNN",
        teacher_millions=51.62,
        loss="PKDLoss",
        loss_weight=6.0,
        levels=(plan,),
        notes=("images are mapped",),
        problems=("no checkpoint",),
    )
    lines = format_report(report).splitlines()
    assert lines[:3] == [
        "student  FCOS",
        "teacher  MaskRCNN (backbone and neck: 51.6 M parameters, frozen)",
        "loss     PKDLoss, weight 6 on each of 1 levels",
    ]
    assert lines[5].split() == ["0", "1", "8/4", "64/256", "student", "conv1x1"]
    assert lines[-2:] == ["note     images are mapped", "PROBLEM  no checkpoint"]
