"""The report of a run as one HTML page that opens without network: light, dark, and on a phone."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

_STYLE = """
:root{color-scheme:light dark;--ground:#fdfdfc;--ink:#1d2327;--soft:#5c666d;--line:#dde1e3;--card:#f3f4f4;
 --keep:#0072b2;--drop:#d55e00;--after:#009e73}
@media (prefers-color-scheme:dark){:root{--ground:#15181a;--ink:#e8eaeb;--soft:#a0a9ae;--line:#31373b;
--card:#1e2326; --keep:#56b4e9;--drop:#e07b2e;--after:#4cc38a}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.2rem;max-width:68rem;background:var(--ground);color:var(--ink);
 font:16px/1.55 system-ui,"Segoe UI",Helvetica,Arial,"Noto Sans CJK SC",sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.25;margin:.4em 0}
h2{font-size:1.2rem;margin:1.9em 0 .4em}
.soft{color:var(--soft)}
table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{text-align:left;padding:.3rem .5rem; border-bottom:1px solid var(--line);vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}
svg{max-width:100%;height:auto;display:block}
svg text{fill:var(--ink);font-size:13px}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:.8rem;margin:.5rem 0}
.pair div{background:var(--card);padding:.6rem; border-radius:4px}
@media(max-width:40rem){.pair{grid-template-columns:1fr}}
"""


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f'<td class="n">{value:.3f}</td>'
    if isinstance(value, int) and not isinstance(value, bool):
        return f'<td class="n">{value:,}</td>'
    return f"<td>{html.escape(str(value))}</td>"


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Rows as an HTML table; ``columns`` maps keys to heads."""
    head = "".join(f"<th>{html.escape(title)}</th>" for title in columns.values())
    body = "".join("<tr>" + "".join(_cell(row.get(key, "")) for key in columns) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def flow(steps: Sequence[Mapping[str, Any]]) -> str:
    """Where rows went: a bar a step, what stays flowing on, what is dropped turning off.

    Args:
        steps: ``op``, ``rows_in``, ``dropped``, ``added``, ``rows_out`` in order.

    Returns:
        An SVG, with the figures as text.
    """
    if not steps:
        return ""
    most = max(max(step["rows_in"] + step["added"], step["rows_out"]) for step in steps) or 1
    high, wide = 46, 420
    parts = []
    for place, step in enumerate(steps):
        y = place * high + 6
        kept = wide * (step["rows_in"] - step["dropped"]) / most
        gone, new = wide * step["dropped"] / most, wide * step["added"] / most
        parts.append(
            f'<rect x="0" y="{y}" width="{kept:.1f}" height="20" fill="var(--keep)"/>'
            f'<rect x="{kept + new:.1f}" y="{y + 6}" width="{gone:.1f}" height="20" fill="var(--drop)" '
            'rx="3"/>'
            f'<rect x="{kept:.1f}" y="{y}" width="{new:.1f}" height="20" fill="var(--after)"/>'
            f'<text x="{wide + 12}" y="{y + 15}">{html.escape(str(step["op"]))}: {step["rows_in"]:,} in, '
            f"{step['dropped']:,} dropped, {step['added']:,} new, {step['rows_out']:,} out</text>"
        )
        if place + 1 < len(steps):
            width = wide * step["rows_out"] / most
            parts.append(
                f'<rect x="0" y="{y + 20}" width="{width:.1f}" height="{high - 20}" fill="var(--keep)" '
                'opacity=".25"/>'
            )
    title = f"Rows through {len(steps)} steps"
    return (
        f'<svg viewBox="0 0 960 {len(steps) * high + 10}" role="img" aria-label="{title}">'
        f"<title>{title}</title>{''.join(parts)}</svg>"
    )


def roc_curve(curve: Mapping[str, Any]) -> str:
    """The threshold's trade: stored prompts that match against harmless ones that do."""
    size = 240
    points = " ".join(
        f"{20 + size * x:.1f},{20 + size * (1 - y):.1f}"
        for x, y in zip(curve["fpr"], curve["tpr"], strict=True)
    )
    return (
        f'<svg viewBox="0 0 420 {size + 60}" role="img" aria-label="ROC"><title>ROC of the prompt '
        "match</title>"
        f'<rect x="20" y="20" width="{size}" height="{size}" fill="none" stroke="var(--line)"/>'
        f'<polyline points="{points}" fill="none" stroke="var(--keep)" stroke-width="2.5"/>'
        f'<text x="20" y="{size + 45}">harmless prompts that match (0 to 1)</text>'
        f'<text x="{size + 32}" y="40">area {curve["area"]:.4f}</text>'
        f'<text x="{size + 32}" y="60">threshold {curve["threshold"]:.4f}</text></svg>'
    )


def render_page(report: Mapping[str, Any]) -> str:
    """A whole report as HTML; every value is escaped, sections without data are left out."""
    parts = [f"<h1>{html.escape(str(report.get('title', 'DPF-CM')))}</h1>"]
    for name, steps in report.get("flows", {}).items():
        parts.append(f"<h2>Rows: {html.escape(name)}</h2>{flow(steps)}")
        reasons = [row for step in steps for row in step.get("reasons", [])]
        if reasons:
            parts.append(
                table(reasons, {"op": "operator", "reason": "why rows were dropped", "rows": "rows"})
            )
    if report.get("samples"):
        parts.append("<h2>Rows before and after</h2>")
        parts += [
            f'<div class="pair"><div>{html.escape(str(pair["before"]))}</div>'
            f"<div>{html.escape(str(pair['after']))}</div></div>"
            for pair in report["samples"]
        ]
    if report.get("stages"):
        columns = {
            "stage": "stage",
            "steps": "updates",
            "first": "first loss",
            "last": "last loss",
            "folder": "folder",
        }
        parts.append("<h2>Training</h2>" + table(report["stages"], columns))
    leak = report.get("leakage")
    if leak:
        parts.append(
            "<h2>What the model gives away, before and behind the guard</h2>"
            f'<p class="soft">{leak["num_samples"]} samples that the model repeats. ROUGE-L on '
            "characters (Chinese) or words; exact: the private text stands in the reply whole. A guard "
            "against found samples and these attacks, not a guarantee.</p>"
        )
        columns = {
            "attack": "attack",
            "rouge_before": "ROUGE-L before",
            "rouge_after": "after",
            "absolute_drop": "absolute drop",
            "relative_drop": "relative drop",
            "above_before": "share > threshold before",
            "above_after": "after",
            "exact_before": "exact before",
            "exact_after": "after",
            "matched": "prompts matched",
        }
        parts.append(table(leak["attacks"], columns))
        columns = {
            "set": "harmless prompts",
            "num": "number",
            "false_positives": "matched wrongly",
            "unchanged": "replies unchanged",
        }
        parts.append(table(leak["benign"], columns))
        parts.append(roc_curve(leak["roc"]))
    for note in report.get("notes", []):
        parts.append(f'<p class="soft">{html.escape(str(note))}</p>')
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(str(report.get('title', 'DPF-CM')))}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>"
    )
