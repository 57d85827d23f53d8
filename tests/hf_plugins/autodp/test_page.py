import re
from html.parser import HTMLParser

import pytest

from hf_plugins.autodp.page import cost_bar, render_page, score_chart, search_tree


def trial(steps: list[str], score: float, low: float, high: float, **more: object) -> dict:
    common = {"strategy": ">".join(steps), "steps": steps, "budget": 1.0, "rows": 9, "round": 1}
    return common | {"score": score, "low": low, "high": high} | more


TRIALS = [
    trial(["clean"], 0.2, 0.1, 0.3),
    trial(["clean", "select"], -0.2, -0.3, -0.1),
    trial(["optimize", "select"], -1.0, -1.0, -1.0, rows=0, failed="no rows are <left>"),
]
SECONDS = {"ops": 2.0, "train": 6.0, "gen": 1.0, "judge": 0.0, "agent": 0.0, "total": 10.0}
RESULT = {
    "format": "autodp.search.1",
    "chosen": ["clean"],
    "chosen_key": "clean",
    "final": {"score": 0.15, "low": 0.05, "high": 0.25, "questions": 40, "seeds": [1]},
    "trials": TRIALS,
    "rounds": [],
    "stopped": "final",
    "rows": {"train": 100, "sample": 20, "dev": 30, "test": 40, "anchors": 5},
    "seconds": SECONDS,
    "counts": {"trainings": 4, "team_runs": 3, "cache_hits": 2},
    "config": {"search": "agent", "metric": "loss", "seed": 1},
    "model": "<model>",
    "versions": {"torch": "2"},
    "hardware": "2 cores",
}


class Balanced(HTMLParser):
    """Counts elements that are left open."""

    EMPTY = frozenset({"meta", "link", "circle", "line", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag not in self.EMPTY and tag not in ("i", "li", "p"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.EMPTY and tag not in ("i", "li", "p"):
            assert self.open.pop() == tag


def test_the_page_is_whole_and_escapes_names() -> None:
    page = render_page(RESULT)
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert "&lt;model&gt;" in page
    assert "&lt;left&gt;" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "+0.1500" in page
    assert "mmhf autodp apply" in page


def test_no_strategy_is_said_so() -> None:
    assert "No strategy is surely better" in render_page(RESULT | {"chosen": [], "chosen_key": "identity"})
    worse = RESULT | {"final": RESULT["final"] | {"low": -0.1}}
    assert "not told apart from raw data" in render_page(worse)


def test_intervals_stand_where_they_belong() -> None:
    """Range -0.3 to 0.3 over 620 units from 300: 0 at 610, 0.1 at 713.3, 0.3 at 920."""
    chart = score_chart(TRIALS)
    assert 'x1="713.3" x2="920.0"' in chart
    assert chart.index("clean</text>") < chart.index("clean&gt;select</text>")
    assert 'class="good"' in chart
    assert 'class="bad"' in chart
    assert "optimize" not in chart
    assert "No strategy was scored" in score_chart([])


def test_the_tree_nests_by_prefix() -> None:
    tree = search_tree(TRIALS)
    assert tree.startswith('<ul class="tree"><li>clean: <b>+0.2000</b>')
    assert 'optimize: <span class="soft">not run by itself</span><ul' in tree
    assert tree.count("<ul") == 3


def test_the_bar_adds_up() -> None:
    widths = [float(w) for w in re.findall(r"width:([\d.]+)%", cost_bar(SECONDS))]
    assert sum(widths) == pytest.approx(100)
    assert widths == [20, 60, 10, 10]


def test_only_results_of_searches() -> None:
    with pytest.raises(ValueError, match="this is no result of a search"):
        render_page({"x": 1})
