"""The report of a search as one HTML page: scores with intervals, the tree of strategies, where time went.

Standard library only, so that a result can be read wherever it lies. It shows names, counts, scores; no row.
"""

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

_STYLE = """
:root{--ground:#fdfdfc;--ink:#1d2327;--soft:#5c666d;--line:#dde1e3;--card:#f4f5f4;--good:#00734f;--bad:#b3420a}
@media(prefers-color-scheme:dark){:root{--ground:#15181a;--ink:#e8eaeb;--soft:#a0a9ae;--line:#31373b;
--card:#1e2326;--good:#3fbf92;--bad:#f0905c}}
*{box-sizing:border-box}body{margin:0 auto;padding:1.2rem;max-width:64rem;background:var(--ground);
color:var(--ink);font:16px/1.55 system-ui,"Segoe UI",Helvetica,Arial,sans-serif}
h1{font-size:1.6rem;line-height:1.2}h2{font-size:1.2rem;margin:1.8em 0 .4em}p,li{max-width:46rem}
.soft{color:var(--soft)}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.3em .9em .3em 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
td:first-child,th:first-child{text-align:left}
pre{background:var(--card);padding:.8em;overflow-x:auto;border-radius:4px}
svg{width:100%;height:auto}svg text{fill:var(--ink);font-size:12px}.zero{stroke:var(--soft)}
.good{stroke:var(--good);fill:var(--good)}.bad{stroke:var(--bad);fill:var(--bad)}
.open{stroke:var(--soft);fill:var(--soft)}
ul.tree{list-style:none;padding-left:1.1rem;border-left:1px solid var(--line)}
.bar{display:flex;height:1.6rem;border-radius:4px;overflow:hidden;margin:.4rem 0}.bar span{min-width:1px}
.key i{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin:0 .35em 0 1em}
""".strip()
_COLOURS = {
    "ops": "#0072b2",
    "train": "#d55e00",
    "gen": "#009e73",
    "judge": "#cc79a7",
    "agent": "#e69f00",
    "rest": "#8a9399",
}
_NAMES = {"ops": "operators", "train": "training", "gen": "held-out answers and losses", "judge": "judging"}


def _number(value: float) -> str:
    return f"{value:+.4f}".replace("-", "\u2212")


def _kind(trial: Mapping[str, Any]) -> str:
    return "good" if trial["low"] > 0 else "bad" if trial["high"] < 0 else "open"


def score_chart(trials: Sequence[Mapping[str, Any]]) -> str:
    """Intervals of all scores at the full length of training, best first, as SVG."""
    full = max((trial["budget"] for trial in trials), default=1)
    rows = sorted(
        (t for t in trials if t["budget"] == full and not t.get("failed")), key=lambda t: -t["score"]
    )
    if not rows:
        return "<p>No strategy was scored to the end.</p>"
    low, high = min(0.0, *(t["low"] for t in rows)), max(0.0, *(t["high"] for t in rows))
    span = (high - low) or 1.0
    left, width, step = 300, 620, 20

    def x(value: float) -> float:
        return left + width * (value - low) / span

    parts = []
    for index, trial in enumerate(rows):
        y = step * (index + 1)
        kind = _kind(trial)
        parts.append(
            f'<text x="0" y="{y + 4}">{html.escape(trial["strategy"][:46])}</text>'
            f'<line class="{kind}" x1="{x(trial["low"]):.1f}" x2="{x(trial["high"]):.1f}" y1="{y}" y2="{y}" '
            f'stroke-width="2"/><circle class="{kind}" cx="{x(trial["score"]):.1f}" cy="{y}" r="4"><title>'
            f"{_number(trial['score'])} ({_number(trial['low'])} to "
            f"{_number(trial['high'])})</title></circle>"
        )
    bottom = step * (len(rows) + 1)
    zero = f'<line class="zero" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="4" y2="{bottom}" stroke-dasharray="3 3"/>'
    ends = (
        f'<text x="{x(0) + 4:.1f}" y="{bottom + 12}">0: raw data</text>'
        f'<text x="{left + width}" y="{bottom + 12}" text-anchor="end">{_number(high)}</text>'
    )
    return (
        f'<svg viewBox="0 0 {left + width + 10} {bottom + 18}" role="img" aria-label="Scores">'
        f"{zero}{''.join(parts)}{ends}</svg>"
    )


def search_tree(trials: Sequence[Mapping[str, Any]]) -> str:
    """Nested list: a strategy stands below the one it lengthens."""
    best: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for trial in trials:
        path = tuple(json.dumps(step) if isinstance(step, dict) else step for step in trial["steps"])
        if path not in best or trial["budget"] >= best[path]["budget"]:
            best[path] = trial

    def branch(prefix: tuple[str, ...]) -> str:
        size = len(prefix) + 1
        names = list(
            dict.fromkeys(path[:size] for path in best if len(path) >= size and path[: size - 1] == prefix)
        )
        if not names:
            return ""
        items = []
        for path in names:
            trial = best.get(path)
            told = '<span class="soft">not run by itself</span>'
            if trial and trial.get("failed"):
                told = f'<span class="soft">failed: {html.escape(trial["failed"][:80])}</span>'
            elif trial:
                told = f"<b>{_number(trial['score'])}</b> <span class=soft>{trial['rows']} rows</span>"
            items.append(f"<li>{html.escape(path[-1])}: {told}{branch(path)}</li>")
        return f'<ul class="tree">{"".join(items)}</ul>'

    return branch(())


def cost_bar(seconds: Mapping[str, float]) -> str:
    """Where the time went, as one bar."""
    total = max(seconds["total"], sum(value for name, value in seconds.items() if name != "total"), 1e-9)
    parts = {name: seconds.get(name, 0.0) for name in ("ops", "train", "gen", "judge", "agent")}
    parts["rest"] = total - sum(parts.values())
    bars = "".join(
        f'<span style="width:{100 * value / total:.2f}%;background:{_COLOURS[name]}" title="{name}"></span>'
        for name, value in parts.items()
        if value > 0
    )
    key = "".join(
        f'<i style="background:{_COLOURS[name]}"></i>{_NAMES.get(name, name)} {value:.0f} s'
        for name, value in parts.items()
        if value > 0
    )
    return f'<div class="bar">{bars}</div><p class="key">{key}</p>'


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _verdict(result: Mapping[str, Any]) -> str:
    final = result["final"]
    if not result["chosen"]:
        return "<p><b>No strategy is surely better than the raw data</b>, which are kept.</p>"
    sure = "better" if final["low"] > 0 else "worse" if final["high"] < 0 else "not told apart from raw data"
    unit = "nats a token less loss" if result["config"]["metric"] == "loss" else "wins minus losses, a share"
    return (
        f"<p>Chosen: <b>{html.escape(result['chosen_key'].replace('>', ', then '))}</b>. On "
        f"{final['questions']} test questions that nothing was chosen by, with fresh seeds: "
        f"<b>{_number(final['score'])}</b> ({_number(final['low'])} to {_number(final['high'])}; {unit}): "
        f"{sure}.</p>"
    )


def render_page(result: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        result: What a search returned, or ``result.json`` read back.

    Returns:
        HTML without any outside resource.

    Raises:
        ValueError: If it is no result of a search.
    """
    if not str(result.get("format", "")).startswith("autodp.search."):
        raise ValueError(f"this is no result of a search: its keys are {', '.join(map(str, result))}.")
    trials, counts = result["trials"], result["counts"]
    rows = [
        [
            t["strategy"],
            f"{t['budget']:g}",
            _number(t["score"]),
            "failed" if t.get("failed") else f"{_number(t['low'])} to {_number(t['high'])}",
            t["rows"],
            t["round"],
        ]
        for t in trials
    ]
    reused = counts["cache_hits"]
    recipe = json.dumps({"strategy": result["chosen"]}, ensure_ascii=False)
    body = [
        f"<h1>Which processing makes the data better for {html.escape(result['model'])}</h1>",
        _verdict(result),
        f"<p class=soft>{result['rows']['train']} rows, {result['rows']['sample']} of them sampled; "
        f"strategies compared on {result['rows']['dev']} questions. Search: "
        f"{html.escape(result['config']['search'])}"
        + (f", ended by {html.escape(result['stopped'])}" if result["stopped"] else "")
        + ".</p>",
        "<h2>Scores</h2><p>Above 0: better than the raw data. Lines are intervals over questions; the "
        "best of many noisy scores looks better than it is, which is why the chosen strategy was scored "
        "anew.</p>",
        score_chart(trials),
        "<h2>Search tree</h2>",
        search_tree(trials),
        "<h2>Where the time went</h2>",
        cost_bar(result["seconds"]),
        f"<p class=soft>{counts['trainings']} trainings, {counts['team_runs']} steps run; {reused} stored "
        "tables used again.</p>",
        "<h2>Recipe</h2><p>recipe.yaml, next to this page, runs on all rows with <code>mmhf autodp "
        "apply</code>:</p>",
        f"<pre>{html.escape(recipe)}</pre>",
        "<h2>All evaluations</h2>",
        _table(["strategy", "updates", "score", "interval", "rows", "round"], rows),
        "<h2>What it means</h2><ul><li>The agent saw names of steps, scores and counts; each message was "
        "checked to hold no 12 characters in a row of any data row. That is no differential privacy: scores "
        "depend on the data.</li><li>Scores are of a sample and of this model; whether they carry over to "
        "all rows or to a larger model must be measured.</li></ul>",
        f"<p class=soft>{html.escape(', '.join(f'{n} {v}' for n, v in result['versions'].items()))}; "
        f"{html.escape(result['hardware'])}; seed {result['config']['seed']}.</p>",
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Data-processing search</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{_STYLE}</style>{''.join(body)}</html>\n"
    )
