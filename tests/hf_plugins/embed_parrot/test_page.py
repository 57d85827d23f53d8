"""The report's page: content, safety of texts, no outside resource."""

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from hf_plugins.embed_parrot.page import chart, render_page, table


def _cell(**changes: Any) -> dict[str, Any]:
    row = {
        "defence": "none",
        "view": "adaptive",
        "layer": 0,
        "attack": "hei",
        "set": "mail",
        "token_acc": [0.5, 0.4, 0.6],
        "per_seed": [0.5],
        "shifted_acc": 0.1,
        "token_f1": 0.6,
        "rouge1": 0.5,
        "rougeL": [0.5, 0.4, 0.6],
        "bleu": 12.0,
        "seconds": 1.0,
    }
    return row | changes


def _report(**changes: Any) -> dict[str, Any]:
    report = {
        "format": "embed_parrot.scan.v1",
        "model": "toy <model>",
        "num_layers": 4,
        "width": 8,
        "vocabulary": 100,
        "duplicate_embeddings": 2,
        "tokens": {"fit": 1000, "test/mail": 50},
        "last_layer": "before the final norm",
        "assumed": "The attacker knows the model.",
        "adaptive_knows": {"none": "the model", "dct:window=8": "the overlap matrix"},
        "skipped": {"vocab": "it needs causal attention"},
        "versions": {"torch": "2"},
        "cells": [
            _cell(),
            _cell(layer=4, token_acc=[0.123, 0.1, 0.2]),
            _cell(defence="dct:window=8", view="naive", layer=4, token_acc=[0.01, 0.0, 0.02]),
            _cell(defence="dct:window=8", layer=4, attack="ridge", token_acc=[0.97, 0.9, 1.0]),
        ],
        "utility": [
            {"defence": "none", "layer": None, "metric": "perplexity", "value": 30.5, "plain": 30.5},
            {"defence": "dct:window=8", "layer": None, "metric": "perplexity", "value": 812.0, "plain": 30.5},
        ],
        "sample": {
            "set": "mail",
            "tokens": ["<b>", " secret", "!"],
            "layers": {
                "0": {
                    "hei": {
                        "tokens": ["<b>", " secret", "?"],
                        "hits": [True, True, False],
                        "text": "<b> secret?",
                    },
                    "ridge": {"tokens": ["<b>", " secret", "?"], "hits": [True, False, False], "text": "..."},
                }
            },
        },
        "verdict": {
            "worst": {
                "defence": "dct:window=8",
                "view": "adaptive",
                "layer": 4,
                "attack": "ridge",
                "set": "mail",
            },
            "leak": 0.97,
            "fail_above": 0.1,
            "failed": True,
        },
    }
    return report | changes


class _Balance(HTMLParser):
    """Counts tags that are open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag not in ("meta", "link", "line", "polyline", "polygon", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "polyline", "polygon"):
            assert self.open.pop() == tag


def test_page_says_what_was_found() -> None:
    page = render_page(_report())
    assert (
        "<b>97.0 % of the tokens were read back</b> from the output of layer 4 under the defence dct:window=8"
        in page
    )
    assert "above the limit of 10.0 %" in page
    assert "12.3 % (hei)" in page
    assert "1.00 % (hei)</td><td>97.0 % (ridge)</td><td>812</td>" in page
    assert "Not run: <code>vocab</code>, because it needs causal attention" in page
    assert "encrypt the channel" in page


def test_tags_are_balanced_and_nothing_comes_from_outside() -> None:
    page = render_page(_report())
    parser = _Balance()
    parser.feed(page)
    assert parser.open == []
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert "prefers-color-scheme:dark" in page
    assert "width=device-width" in page


def test_texts_cannot_break_the_page() -> None:
    page = render_page(_report())
    assert "toy &lt;model&gt;" in page
    assert "&lt;b&gt;</span>" in page
    assert "<model>" not in page


def test_heat_is_the_share_of_attacks() -> None:
    """Of two attacks both name the first token, one the second, none the third: 70, 35 and 0 per cent
    colour.
    """
    shares = re.findall(r"--share:(\d+)%", render_page(_report()))
    assert shares == ["70", "35", "0"]
    assert "<code>hei</code> reads: &lt;b&gt; secret?" in render_page(_report())


@pytest.mark.parametrize(
    ("leak", "words"),
    [
        (0.9, "as good as sent in the clear"),
        (0.2, "Much of a text can be read back"),
        (0.01, "that is no proof"),
    ],
)
def test_verdict_in_plain_words(leak: float, words: str) -> None:
    verdict = _report()["verdict"] | {"leak": leak, "failed": False, "fail_above": 1.0}
    page = render_page(_report(verdict=verdict))
    assert words in page
    assert "the limit of" not in page


def test_report_without_text_measures_and_defences() -> None:
    plain = {key: value for key, value in _cell().items() if key not in ("bleu", "rouge1", "rougeL")}
    page = render_page(_report(cells=[plain], sample={}, utility=[]))
    assert "ROUGE" not in page
    assert "With a defence" not in page
    assert "token by token" not in page
    assert "Without a defence" not in render_page(_report(cells=[_cell(defence="int8")], sample={}))


def test_points_of_a_chart_stand_where_they_should() -> None:
    """Layer 2 of 4 is half-way between 60 and 544; a share of 1 is at the top, 12."""
    figure = chart("x", {"hei": {2: [1.0, 0.9, 1.0], 0: [0.0, 0.0, 0.1]}}, num_layers=4)
    assert 'cx="302.0" cy="12.0"' in figure
    assert 'cx="60.0" cy="256.0"' in figure


def test_cells_of_a_table_are_text() -> None:
    assert "<td class=text>&lt;i&gt;</td><td>2</td>" in table(["a", "b"], [["<i>", 2]])


def test_other_files_are_refused() -> None:
    with pytest.raises(ValueError, match="this is no report of a leak scan: its keys are .*a, b"):
        render_page({"a": 1, "b": 2})
