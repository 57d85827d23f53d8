from html.parser import HTMLParser

from hf_plugins.dpf_cm.page import flow, render_page, roc_curve, table

STEPS = [
    {"op": "read", "rows_in": 10, "dropped": 2, "added": 0, "rows_out": 8, "reasons": []},
    {
        "op": "a<b>", "rows_in": 8, "dropped": 4, "added": 1, "rows_out": 5,
        "reasons": [{"op": "a<b>", "reason": "too <short>", "rows": 4}],
    },
]  # fmt: skip


class _Balance(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "rect", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "polyline"):
            assert self.open.pop() == tag


def test_bars_are_to_scale() -> None:
    """8 of 10 rows kept are 0.8 of 420 = 336 wide, 2 dropped 84."""
    svg = flow(STEPS)
    assert 'width="336.0"' in svg
    assert 'width="84.0"' in svg
    assert "8 in, 4 dropped, 1 new, 5 out" in svg
    assert "a&lt;b&gt;" in svg
    assert flow([]) == ""


def test_page_is_whole_escaped_and_offline() -> None:
    leak = {
        "num_samples": 3,
        "attacks": [{"attack": "question", "rouge_before": 0.98, "rouge_after": 0.1, "absolute_drop": 0.88}],
        "benign": [{"set": "x", "num": 5, "false_positives": 0.0, "unchanged": 1.0}],
        "roc": {"fpr": [0, 0, 1], "tpr": [0, 1, 1], "area": 1.0, "threshold": 0.5},
    }
    page = render_page(
        {
            "title": "<run>", "flows": {"sft": STEPS},
            "samples": [{"before": "<p>头痛</p>", "after": "头痛"}],
            "stages": [{"stage": "sft", "steps": 10, "first": 6.0, "last": 2.5, "folder": "sft-1"}],
            "leakage": leak, "notes": ["left out: <x>"],
        }
    )  # fmt: skip
    balance = _Balance()
    balance.feed(page)
    assert balance.open == []
    assert "<p>头痛" not in page
    assert "&lt;p&gt;头痛" in page
    assert "0.980" in page
    assert "too &lt;short&gt;" in page
    assert "http" not in page
    empty = render_page({})
    assert "<h2>" not in empty


def test_parts() -> None:
    assert '<td class="n">1,234</td>' in table([{"n": 1234}], {"n": "number"})
    assert "area 0.7500" in roc_curve({"fpr": [0, 1], "tpr": [0, 1], "area": 0.75, "threshold": 0.3})
