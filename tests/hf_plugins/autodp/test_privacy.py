import random
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_plugins.autodp.privacy import PrivacyError, PrivacyGuard


def guard(rows: list[str], public: tuple[str, ...] = ()) -> PrivacyGuard:
    return PrivacyGuard(lambda: iter(rows), public)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text("ab ", max_size=40), max_size=5), st.text("ab ", max_size=40))
def test_exactly_the_common_windows(rows: list[str], message: str) -> None:
    windows = {message[i : i + 12] for i in range(len(message) - 11)}
    assert guard(rows).leaks(message) == sorted(w for w in windows if any(w in row for row in rows))


def test_twelve_characters_leak_and_eleven_do_not() -> None:
    row = "Patient 4711, allergic to penicillin"
    watch = guard([row])
    assert watch.leaks("xx" + row[5:17] + "yy") == [row[5:17]]
    assert watch.leaks("xx" + row[5:16] + "yy") == []
    assert guard(["患者张三于二零二五年确诊糖尿病"]).leaks("他说患者张三于二零二五年确诊") != []


def test_fixed_prompts_are_public() -> None:
    public = "Reply with one JSON object"
    watch = guard(["Reply with one JSON object, please", "secret words here"], (public,))
    assert watch.leaks(f"{public}.") == []
    assert watch.leaks("secret words here") != []


def test_the_error_tells_where_but_never_what() -> None:
    watch = guard(["the secret diagnosis"])
    watch.check([{"role": "user", "content": "clean: 0.1234"}])
    with pytest.raises(PrivacyError, match="Keep texts of rows out of names of steps") as caught:
        watch.check([{"role": "user", "content": "ok"}, {"role": "user", "content": "the secret diagnosis"}])
    assert "message 1" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_no_row_at_all() -> None:
    assert guard([]).leaks("a message of some length") == []


def test_memory_is_two_bytes_a_character() -> None:
    generator = random.Random(0)
    rows = ["".join(generator.choices("abcdefgh ", k=500)) for _ in range(2000)]
    tracemalloc.start()
    watch = guard(rows)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 2.2e6
    assert watch.leaks(rows[1999][:12])
