"""Working ahead keeps order, bounds, and errors in their place."""

import threading
from collections.abc import Iterator

import pytest

from hf_plugins.tee_split.ahead import ahead


@pytest.mark.parametrize("depth", [0, 1, 3, 50])
def test_order_is_kept(depth: int) -> None:
    assert list(ahead(range(20), depth)) == list(range(20))


@pytest.mark.parametrize("depth", [0, 2])
def test_error_comes_where_its_item_would(depth: int) -> None:
    def source() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError("here")

    found = ahead(source(), depth)
    assert next(found) == 1
    with pytest.raises(ZeroDivisionError, match="here"):
        next(found)


def test_at_most_depth_items_wait() -> None:
    made, third = [], threading.Event()

    def source() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            if number == 3:
                third.set()
            yield number

    found = ahead(source(), 3)
    assert next(found) == 0
    assert third.wait(5)
    # One was taken, three may wait.
    assert len(made) <= 4
    found.close()


def test_it_works_in_another_thread() -> None:
    names = list(ahead((threading.current_thread().name for _ in range(2)), 1))
    assert all(name.startswith("tee-split-ahead") for name in names)
