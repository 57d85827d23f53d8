"""Pieces of a self-contained HTML report: line charts as inline SVG, tables, pictures; light and dark."""

import base64
import html
import math
from collections.abc import Mapping, Sequence

# Okabe and Ito's palette: told apart with every common form of colour blindness.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")

STYLE = """
:root{--ground:#fdfdfc;--ink:#1d2327;--soft:#5c666d;--line:#dde1e3;--card:#f4f5f4}
@media (prefers-color-scheme:dark){:root{--ground:#15181a;--ink:#e8eaeb;--soft:#a0a9ae;--line:#31373b;
--card:#1e2326}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.2rem;max-width:68rem;background:var(--ground);color:var(--ink);
 font:16px/1.55 system-ui,"Segoe UI",Helvetica,Arial,sans-serif}
h1{font-size:1.7rem;line-height:1.2;margin:.4em 0}
h2{font-size:1.2rem;margin:1.8em 0 .4em}
p,li{max-width:46rem}
.soft{color:var(--soft)}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}
td,th{padding:.35em .9em .35em 0;text-align:right;border-bottom:1px solid var(--line)}
td:first-child,th:first-child{text-align:left}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1.2rem}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,10rem),1fr));gap:.7rem;
margin:.7rem 0}
figure{margin:0}
figure img{width:100%;height:auto;display:block;border-radius:4px}
.drawing{background:#fff;color:#000;border-radius:4px}
.drawing svg text{fill:#222}
.shown{max-width:46rem}
.drawing svg{width:100%;height:auto;display:block}
figcaption{font-size:.85rem;color:var(--soft);padding:.2rem 0}
svg{width:100%;height:auto}
svg text{fill:var(--soft);font-size:12px}
svg .grid{stroke:var(--line)}
code,pre{background:var(--card);border-radius:4px;padding:.1em .3em;font-size:.9em}
pre{padding:.8em;overflow-x:auto}
""".strip()


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover a range, at most ``count`` + 1 of them."""
    span = max(high - low, 1e-9)
    step = 10.0 ** math.floor(math.log10(span / count))
    step = next(step * factor for factor in (1, 2, 5, 10) if span / (step * factor) <= count)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(
    title: str,
    lines: Mapping[str, Mapping[int, float]],
    *,
    x_label: str,
    y_label: str,
    y_from_zero: bool = True,
) -> str:
    """An SVG line chart with its legend below; ``lines`` maps a name to its x -> y values.

    Raises:
        ValueError: If there is nothing to draw.
    """
    points = [(x, y) for line in lines.values() for x, y in line.items()]
    if not points:
        raise ValueError(f"chart {title!r} has no point to draw; check that the runs logged these values")
    width, height, left, bottom, top, right = 560, 300, 48, 40, 12, 14
    xs, ys = zip(*points, strict=True)
    x0, x1 = min(xs), max(max(xs), min(xs) + 1e-9)
    y0 = min(0.0, *ys) if y_from_zero else min(ys)
    y1 = max(max(ys), y0 + 1e-9)

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (x - x0) / (x1 - x0) * (width - left - right)
        return across, height - bottom - (y - y0) / (y1 - y0) * (height - bottom - top)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">']
    for y in ticks(y0, y1):
        across, down = place(x0, y)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{down:.1f}" y2="{down:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{down + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in ticks(x0, x1):
        across, _ = place(x, y0)
        parts.append(f'<text x="{across:.1f}" y="{height - bottom + 16}" text-anchor="middle">{x:g}</text>')
    parts.append(
        f'<text x="{(width + left) / 2}" y="{height - 4}" text-anchor="middle">{html.escape(x_label)}</text>'
    )
    parts.append(
        f'<text transform="translate(12 {(height - bottom) / 2}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(y_label)}</text>"
    )
    for (_, line), colour in zip(lines.items(), COLOURS * 9, strict=False):
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in sorted(line.items()))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y in line.items() if len(line) < 30 else ():
            across, down = place(x, y)
            parts.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="3" fill="{colour}"/>')
    keys = " &nbsp; ".join(
        f'<span style="color:{colour}">&#9632;</span> {html.escape(name)}'
        for name, colour in zip(lines, COLOURS * 9, strict=False)
    )
    return (
        f"<figure><b>{html.escape(title)}</b>{''.join(parts)}</svg><figcaption>{keys}</figcaption></figure>"
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """An HTML table that scrolls sideways on a narrow screen."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def picture(jpeg: bytes, caption: str) -> str:
    """A picture inside the page itself."""
    data = base64.b64encode(jpeg).decode()
    alt = html.escape(caption)
    image = f'<img alt="{alt}" src="data:image/jpeg;base64,{data}">'
    return f"<figure>{image}<figcaption>{alt}</figcaption></figure>"


def page(title: str, body: str) -> str:
    """A whole page that opens without network."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style><h1>{html.escape(title)}</h1>{body}</html>\n'
    )
