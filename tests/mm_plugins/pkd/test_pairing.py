"""Which level learns from which."""

import pytest

from mm_plugins.pkd.pairing import check_levels, pair_by_index, pair_by_stride

ONE_STAGE = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]
TWO_STAGE = [(200, 336), (100, 168), (50, 84), (25, 42), (13, 21)]


def test_by_index_is_the_authors_choice() -> None:
    """2.4: level i with level i whatever the strides."""
    assert pair_by_index((0, 1, 2, 3), 5, 4) == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_by_stride_matches_p3_with_p3() -> None:
    """An 800 x 1344 image: the student's P3..P6 are outputs 0..3, the teacher's are 1..4."""
    assert pair_by_stride((0, 1, 2, 3), ONE_STAGE, TWO_STAGE) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert pair_by_stride((1, 2, 3), TWO_STAGE, ONE_STAGE) == [(1, 0), (2, 1), (3, 2)]


def test_by_stride_takes_the_first_of_equal_sizes() -> None:
    """A 64-pixel image: P6 and P7 are one pixel each; P6 finds P6."""
    student, teacher = [(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)], [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]
    assert pair_by_stride((0, 1, 2, 3), student, teacher) == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_by_stride_tolerates_rounding() -> None:
    """13 x 21 and 12 x 20 are one stride, rounded differently."""
    assert pair_by_stride((0,), [(13, 21)], [(25, 42), (12, 20)]) == [(0, 1)]


def test_by_stride_without_partner() -> None:
    with pytest.raises(
        ValueError, match="Leave level 0 out of distill.levels, or set distill.pairing='index'"
    ):
        pair_by_stride((0, 1), TWO_STAGE, ONE_STAGE)
    with pytest.raises(ValueError, match="student level 1 of size .* has no partner"):
        pair_by_stride((0, 1), [(8, 8), (8, 8)], [(8, 8)])


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_levels_beyond_the_pyramid(whose: str) -> None:
    sizes = (4, 5) if whose == "student" else (5, 4)
    message = f" names level .*4, but the {whose} has 4 levels .*Set distill.levels=.*0, 3."
    with pytest.raises(ValueError, match=message):
        pair_by_index((0, 4, 3), *sizes)
    with pytest.raises(ValueError, match="names level -1"):
        check_levels((-1,), 4, whose)
