"""What a pair of models will do to each other, as a table to read before training."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class LevelPlan:
    """One line of the report: a level of the student and its partner.

    Attributes:
        student_level: Index among the outputs of the student's neck.
        teacher_level: Index among the teacher's.
        student_stride: Input pixels per position.
        teacher_stride: The same of the teacher.
        student_channels: Channels of the student's map.
        teacher_channels: Channels of the teacher's.
        resized: Which map is resized to the other: ``student``, ``teacher`` or empty.
        adapted: Whether a 1x1 convolution matches the channels.
    """

    student_level: int
    teacher_level: int
    student_stride: int
    teacher_stride: int
    student_channels: int
    teacher_channels: int
    resized: str
    adapted: bool


@dataclass(frozen=True, kw_only=True)
class InspectReport:
    """Result of a dry run.

    Attributes:
        student: Class of the student.
        teacher: Class of the teacher.
        teacher_millions: Parameters of the teacher's backbone and neck, in millions.
        loss: Class of the loss.
        loss_weight: Its weight per level.
        levels: The pairs that distil.
        notes: What is good to know.
        problems: What would stop the training.
    """

    student: str
    teacher: str
    teacher_millions: float
    loss: str
    loss_weight: float
    levels: tuple[LevelPlan, ...]
    notes: tuple[str, ...] = field(default=())
    problems: tuple[str, ...] = field(default=())


def format_report(report: InspectReport) -> str:
    """The report as text, a table of the levels first, problems last."""
    lines = [
        f"student  {report.student}",
        f"teacher  {report.teacher} (backbone and neck: {report.teacher_millions:.1f} M parameters, frozen)",
        f"loss     {report.loss}, weight {report.loss_weight:g} on each of {len(report.levels)} levels",
        "",
        "student level  teacher level  strides    channels   resized   adapter",
    ]
    for plan in report.levels:
        strides = f"{plan.student_stride}/{plan.teacher_stride}"
        channels = f"{plan.student_channels}/{plan.teacher_channels}"
        lines.append(
            f"{plan.student_level:<13}  {plan.teacher_level:<13}  {strides:<9}  {channels:<9}  "
            f"{plan.resized or 'no':<8}  {'conv1x1' if plan.adapted else 'no'}"
        )
    lines.append("")
    lines += [f"note     {note}" for note in report.notes]
    lines += [f"PROBLEM  {problem}" for problem in report.problems]
    return "\n".join(lines)
