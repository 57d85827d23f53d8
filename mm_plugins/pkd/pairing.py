"""Which level of the student's pyramid learns from which level of the teacher's."""

import math
from collections.abc import Sequence

Size = tuple[int, int]
"""Height and width of a feature map."""


def check_levels(levels: Sequence[int], num_levels: int, whose: str) -> None:
    """Refuse levels that a pyramid does not have.

    Args:
        levels: Indices into the pyramid.
        num_levels: How many maps the pyramid has.
        whose: ``student`` or ``teacher``, for the message.

    Raises:
        ValueError: If an index is not in ``0 .. num_levels - 1``.
    """
    beyond = [level for level in levels if not 0 <= level < num_levels]
    if beyond:
        raise ValueError(
            f"distill.levels={tuple(levels)} names level {beyond[0]}, but the {whose} has {num_levels} "
            f"levels (0..{num_levels - 1}). Set "
            f"distill.levels={tuple(lv for lv in levels if lv not in beyond)}."
        )


def pair_by_index(levels: Sequence[int], num_student: int, num_teacher: int) -> list[tuple[int, int]]:
    """Level i with level i, whatever their strides: the pairing of the authors' release.

    Args:
        levels: Levels that distil.
        num_student: Number of the student's maps.
        num_teacher: Number of the teacher's maps.

    Returns:
        Pairs (student level, teacher level).

    Raises:
        ValueError: If one of the two has no such level.
    """
    check_levels(levels, num_student, "student")
    check_levels(levels, num_teacher, "teacher")
    return [(level, level) for level in levels]


def pair_by_stride(
    levels: Sequence[int], student_sizes: Sequence[Size], teacher_sizes: Sequence[Size]
) -> list[tuple[int, int]]:
    """Each student level with the teacher level of the same stride, read off the sizes of the maps.

    Both see the same image, so equal strides give equal sizes up to rounding; less than a factor of sqrt(2)
    apart is the same stride. On tiny images, where several levels are one pixel, the first free one is taken.

    Args:
        levels: Student levels that distil.
        student_sizes: (H, W) of all maps of the student, finest first.
        teacher_sizes: The same of the teacher.

    Returns:
        Pairs (student level, teacher level).

    Raises:
        ValueError: If a level has no partner.
    """
    check_levels(levels, len(student_sizes), "student")
    pairs: list[tuple[int, int]] = []
    free = list(range(len(teacher_sizes)))
    for level in levels:
        gap, best = min(
            ((_octaves(student_sizes[level], teacher_sizes[other]), other) for other in free),
            default=(math.inf, -1),
        )
        if gap >= 0.5:
            raise ValueError(
                f"distill.pairing='stride': student level {level} of size {student_sizes[level]} has no "
                f"partner; the teacher's levels have sizes {list(teacher_sizes)}. Leave level {level} out "
                "of distill.levels, or set distill.pairing='index', which resizes."
            )
        free.remove(best)
        pairs.append((level, best))
    return pairs


def _octaves(one: Size, other: Size) -> float:
    """How many factors of two lie between two map sizes."""
    return abs(math.log2(one[0] * one[1]) - math.log2(other[0] * other[1])) / 2
