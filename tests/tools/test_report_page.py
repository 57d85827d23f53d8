"""The pieces of a report: charts by hand, nothing fetched from the network, text escaped."""

import re

import pytest

from tools import report_page


def test_round_ticks() -> None:
    assert report_page.ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert report_page.ticks(0.0, 43.0) == [0, 10, 20, 30, 40]


def test_line_runs_from_corner_to_corner() -> None:
    """Axes leave 48, 14, 12 and 40 px (left, right, top, bottom): y = 0..1 over x = 0..10 fills the rest."""
    chart = report_page.line_chart("t", {"a": {0: 0.0, 10: 1.0}}, x_label="x", y_label="y")
    assert 'points="48.0,260.0 546.0,12.0"' in chart


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(ValueError, match="check that the runs logged these values"):
        report_page.line_chart("empty", {"a": {}}, x_label="x", y_label="y")


def test_page_is_self_contained_and_escaped() -> None:
    body = report_page.table(["a<b"], [["<script>"]]) + report_page.picture(b"\xff\xd8", 'a "cell"')
    page = report_page.page("t", body)
    assert "&lt;script&gt;" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
