"""The page of versions: a row by hand, and what setup.cfg allows now."""

from tools.make_versions import PAGE, allowed, current, licence, oldest_pins, page

SETUP = """
[options.extras_require]
hf =
    # a comment
    numpy>=2,<3
    Nowhere[x]
all =
    mmhf-plugins[hf]
"""


def test_rows_by_hand() -> None:
    assert allowed(SETUP) == {"hf": [("numpy", ">=2,<3"), ("Nowhere", "any")]}
    text = page(SETUP, {"numpy": "2.0.0"})
    assert "| numpy | >=2,<3 | 2." in text
    assert " | 2.0.0 | " in text
    assert "| Nowhere | any | not installed | - | not installed |" in text
    assert "BSD" in licence("numpy")
    assert oldest_pins("a==1\nb-c==2.0\n") == {"a": "1", "b-c": "2.0"}


def test_the_page_is_not_stale() -> None:
    """Columns that depend on the checkout alone: package, range and oldest version."""

    def columns(text: str) -> list[tuple[str, ...]]:
        rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
        return [(row[0], row[1], row[3]) for row in rows]

    stale = "run `python tools/make_versions.py`"
    assert columns(PAGE.read_text(encoding="utf-8")) == columns(current()), stale
