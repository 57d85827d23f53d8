"""A scan's report as one HTML page that opens without network: light, dark, and on a phone."""

# Plain strings and the values of a report; no tensors.
import html
from collections.abc import Mapping, Sequence
from typing import Any

# Okabe and Ito's colours, told apart with every common form of colour blindness; marks differ as well.
_COLOURS = {
    "bei": "#d55e00",
    "bei_norm": "#e69f00",
    "hei": "#0072b2",
    "ridge": "#009e73",
    "parrot": "#cc79a7",
    "vocab": "#56b4e9",
}
_WORDS = {
    "bei": "reads the states with the model's own output head (BEI)",
    "bei_norm": "the same after the final norm (logit lens)",
    "hei": "takes the nearest input embedding (HEI, the hot map)",
    "ridge": "maps states back to embeddings by a linear map fitted on public text, then HEI",
    "parrot": "maps them back by a trained transformer (Embed Parrot), then HEI",
    "vocab": "runs the model on candidate tokens and compares (exact for causal models)",
}
_UTILITY = {
    "perplexity": "perplexity (lower is better)",
    "pooled_cosine": "cosine of pooled outputs to those of the plain model (1 is unharmed)",
}

_STYLE = """
:root{color-scheme:light dark;--ground:#fdfdfc;--ink:#1d2327;--soft:#5c666d;--line:#dde1e3;--card:#f3f4f4;
 --hot:#d55e00;--bad:#b3261e;--good:#1b6e3c}
@media (prefers-color-scheme:dark){:root{--ground:#15181a;--ink:#e8eaeb;--soft:#a0a9ae;--line:#31373b;
 --card:#1e2326;--hot:#e07b2e;--bad:#ff8a80;--good:#7bd8a0}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.2rem;max-width:68rem;background:var(--ground);color:var(--ink);
 font:16px/1.55 system-ui,"Segoe UI",Helvetica,Arial,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.25;margin:.4em 0}
h2{font-size:1.2rem;margin:1.9em 0 .4em}
h3{font-size:1rem;margin:1.2em 0 .2em}
p,li{max-width:46rem}
.soft{color:var(--soft)}
.verdict{border-left:.4rem solid var(--tone);background:var(--card);padding:.7rem 1rem;border-radius:4px}
.verdict b{color:var(--tone)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;min-width:100%}
td,th{padding:.35em .9em .35em 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
td.text,th.text{text-align:left}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:1.2rem}
figure{margin:0;max-width:36rem}
figcaption{font-size:.88rem;color:var(--soft)}
svg{width:100%;height:auto;display:block}
svg text{fill:var(--soft);font-size:13px}
svg .grid{stroke:var(--line)}
.key{display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.9rem;margin:.2rem 0}
.key i{display:inline-block;width:.8em;height:.8em;border-radius:50%;margin-right:.35em}
.heat{margin:.35rem 0;padding-left:5.2rem;text-indent:-5.2rem;line-height:1.9}
.heat b{display:inline-block;width:5.2rem;text-indent:0;font-weight:600}
.heat span{text-indent:0;padding:.12em .22em;margin:0 .05em;border-radius:3px;
 background:color-mix(in srgb,var(--hot) var(--share),transparent)}
.read{margin:0 0 .8rem 5.2rem;font-size:.9rem}
code{background:var(--card);border-radius:4px;padding:.05em .3em;font-size:.92em}
@media (max-width:40rem){.heat{padding-left:0;text-indent:0}.read{margin-left:0}body{padding:.8rem}
 svg text{font-size:19px}}
""".strip()


def _share(value: float) -> str:
    """A share as people read it, without claiming more than was seen."""
    return f"{100 * value:.1f} %" if 0.1 <= value < 0.995 or value in (0, 1) else f"{100 * value:.2f} %"


def _layer(layer: Any) -> str:
    return "embeddings" if layer == 0 else f"layer {layer}"


def chart(title: str, lines: Mapping[str, Mapping[int, Sequence[float]]], *, num_layers: int) -> str:
    """Recovery by layer as inline SVG.

    Args:
        title: Above the chart.
        lines: For each attack, ``layer -> (mean, low, high)``, shares in [0, 1].
        num_layers: Right end of the axis.

    Returns:
        A ``<figure>``.
    """
    width, height, left, right, top, bottom = 560, 300, 60, 16, 12, 44

    def at(layer: float, share: float) -> tuple[float, float]:
        return (
            left + layer / max(num_layers, 1) * (width - left - right),
            height - bottom - share * (height - top - bottom),
        )

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">']
    for tick in (0, 0.25, 0.5, 0.75, 1):
        y = at(0, tick)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{100 * tick:.0f} %</text>')
    step = max(1, -(-num_layers // 8))
    for layer in range(0, num_layers + 1, step):
        x = at(layer, 0)[0]
        parts.append(f'<text x="{x:.1f}" y="{height - bottom + 18}" text-anchor="middle">{layer}</text>')
    parts.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 5}" text-anchor="middle">'
        "layer whose output is seen (0 = embeddings)</text>"
    )
    for number, (attack, line) in enumerate(lines.items()):
        colour = _COLOURS[attack]
        points = sorted(line.items())
        band = [at(layer, value[2]) for layer, value in points] + [
            at(layer, value[1]) for layer, value in points[::-1]
        ]
        shape = " ".join(f"{x:.1f},{y:.1f}" for x, y in band)
        parts.append(f'<polygon points="{shape}" fill="{colour}" opacity=".15"/>')
        path = " ".join("{:.1f},{:.1f}".format(*at(layer, value[0])) for layer, value in points)
        dash = ("", "6 3", "2 3", "8 3 2 3", "10 4", "4 4")[number % 6]
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.4" '
            f'stroke-dasharray="{dash}"/>'
        )
        for layer, value in points:
            x, y = at(layer, value[0])
            note = f"{attack}, {_layer(layer)}: {_share(value[0])} ({_share(value[1])} - {_share(value[2])})"
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6" fill="{colour}"><title>{note}</title></circle>'
            )
    return f"<figure><h3>{html.escape(title)}</h3>{''.join(parts)}</svg></figure>"


def _key(attacks: Sequence[str]) -> str:
    items = [
        f'<span><i style="background:{_COLOURS[a]}"></i><b>{a}</b> {html.escape(_WORDS[a])}</span>'
        for a in attacks
    ]
    return f'<div class="key">{"".join(items)}</div>'


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, num_text: int = 1) -> str:
    """An HTML table that scrolls sideways on a narrow screen; the first ``num_text`` columns hold words."""

    def cells(tag: str, row: Sequence[object]) -> str:
        return "".join(
            f"<{tag}{' class=text' if i < num_text else ''}>{html.escape(str(cell))}</{tag}>"
            for i, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{cells("th", columns)}</tr>{body}</table></div>'


def _best(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return max(rows, key=lambda row: row["token_acc"][0], default=None)


def _verdict(report: Mapping[str, Any]) -> str:
    found = report["verdict"]
    worst, leak = found["worst"], found["leak"]
    where = _layer(worst["layer"]) if worst["layer"] == 0 else f"the output of {_layer(worst['layer'])}"
    under = "" if worst["defence"] == "none" else f" under the defence {worst['defence']}"
    if leak >= 0.5:
        meaning = "To whoever receives these states, the text is as good as sent in the clear."
    elif leak >= 0.1:
        meaning = "Much of a text can be read back; names and numbers must be expected among it."
    else:
        meaning = (
            "The attacks that were run read little of it; that is no proof that a better one reads as little."
        )
    limit = ""
    if found["fail_above"] < 1:
        word = "above" if found["failed"] else "within"
        limit = f" That is {word} the limit of {_share(found['fail_above'])} set for this scan."
    tone = "var(--bad)" if leak >= 0.1 or found["failed"] else "var(--good)"
    return (
        f'<p class="verdict" style="--tone:{tone}"><b>{_share(leak)} of the tokens were read back</b> from '
        f"{html.escape(where)}{html.escape(under)}, by the attack <code>{worst['attack']}</code> on "
        f"&ldquo;{html.escape(worst['set'])}&rdquo;. {meaning}{limit}</p>"
    )


def _charts(report: Mapping[str, Any]) -> str:
    plain = [row for row in report["cells"] if row["defence"] == "none"]
    if not plain:
        return ""
    attacks = list(dict.fromkeys(row["attack"] for row in plain))
    figures = []
    for name in dict.fromkeys(row["set"] for row in plain):
        lines: dict[str, dict[int, Sequence[float]]] = {attack: {} for attack in attacks}
        for row in plain:
            if row["set"] == name:
                lines[row["attack"]][row["layer"]] = row["token_acc"]
        figures.append(chart(f"Tokens read back: {name}", lines, num_layers=report["num_layers"]))
    return (
        "<h2>Without a defence</h2><p>Share of tokens guessed right at their position, by how deep the "
        "states were taken. Bands are 95 % intervals over texts.</p>"
        f'{_key(attacks)}<div class="charts">{"".join(figures)}</div>'
    )


def _heat(report: Mapping[str, Any]) -> str:
    sample = report["sample"]
    if not sample or not sample["layers"]:
        return ""
    rows = []
    for layer, guesses in sample["layers"].items():
        spans = []
        for position, token in enumerate(sample["tokens"]):
            note = ", ".join(
                f"{a}: {row['tokens'][position].strip() or 'space'}" for a, row in guesses.items()
            )
            share = 70 * sum(row["hits"][position] for row in guesses.values()) / len(guesses)
            shown = html.escape(token.strip() or "_")
            spans.append(f'<span style="--share:{share:.0f}%" title="{html.escape(note)}">{shown}</span>')
        best = max(guesses, key=lambda attack: sum(guesses[attack]["hits"]))
        read = html.escape(guesses[best]["text"])
        label = "embed." if layer == "0" else f"layer {layer}"
        rows.append(f'<p class="heat"><b>{label}</b>{" ".join(spans)}</p>')
        rows.append(f'<p class="read soft"><code>{best}</code> reads: {read}</p>')
    return (
        "<h2>One text, token by token</h2><p>The stronger the colour, the more of the attacks "
        f"({', '.join(next(iter(sample['layers'].values())))}) recovered that token at that depth. Point "
        f"at a token to see the guesses.</p>{''.join(rows)}"
    )


def _defences(report: Mapping[str, Any]) -> str:
    specs = list(dict.fromkeys(row["defence"] for row in report["cells"]))
    if specs == ["none"]:
        return ""
    layers = sorted({row["layer"] for row in report["cells"]})
    rows = []
    for spec in specs:
        for layer in layers:
            here = [row for row in report["cells"] if row["defence"] == spec and row["layer"] == layer]
            naive = _best([row for row in here if row["view"] == "naive"])
            # Who knows of a defence may still use an attack that does not.
            adaptive = _best(here)
            use = [
                f"{entry['value']:.4g}"
                for entry in report["utility"]
                if entry["defence"] == spec and entry["layer"] in (layer, None)
            ]
            if adaptive is not None:
                rows.append(
                    [
                        spec,
                        _layer(layer),
                        "" if naive is None else f"{_share(naive['token_acc'][0])} ({naive['attack']})",
                        f"{_share(adaptive['token_acc'][0])} ({adaptive['attack']})",
                        " / ".join(use),
                    ]
                )
    metrics = list(dict.fromkeys(entry["metric"] for entry in report["utility"]))
    used = " / ".join(_UTILITY.get(metric, metric) for metric in metrics) or "not measured"
    knows = "".join(
        f"<li><code>{html.escape(spec)}</code>: the adaptive attacker knows {html.escape(text)}.</li>"
        for spec, text in report["adaptive_knows"].items()
        if spec != "none"
    )
    columns = ["defence", "cut", "naive attacker, best", "adaptive attacker, best", "use of the model"]
    return (
        "<h2>With a defence</h2><p>A naive attacker does not know of the defence; an adaptive one does, "
        "and fits its attacks under it. <b>Only the adaptive column counts</b>: a defence that is fixed, or "
        "whose key the model's side must share, is a code and no secret. What it costs stands beside "
        f"it.</p>{table(columns, rows, num_text=2)}<p class=soft>Use of the model: "
        f"{html.escape(used)}.</p><ul>{knows}</ul>"
    )


def _meaning(report: Mapping[str, Any]) -> str:
    points = [
        "Hidden states are not anonymous: a state of this width carries far more bits than the choice of a "
        "token needs, so depth alone hides nothing from an attacker who can run the model.",
        "Fixed transforms, permutations and 8-bit rounding are no protection. What helps is that the states "
        "are never seen in the clear: encrypt the channel and compute in an attested enclave (in this suite: "
        "<code>mmhf tee-split</code>), or noise so strong that the model's use suffers, as the table shows.",
        "A low figure means that these attacks failed with this much public text, not that the states are "
        "safe.",
    ]
    return "<h2>What it means</h2><ul>" + "".join(f"<li>{point}</li>" for point in points) + "</ul>"


def _all_figures(report: Mapping[str, Any]) -> str:
    columns = [
        "defence",
        "attacker",
        "cut",
        "attack",
        "text",
        "tokens right",
        "95 % interval",
        "next-token",
        "F1",
    ]
    has_text = all("bleu" in row for row in report["cells"])
    has_entities = any("entity_recall" in row for row in report["cells"])
    columns += ["ROUGE-1", "ROUGE-L", "BLEU"] if has_text else []
    columns += ["entities"] if has_entities else []
    columns += ["seeds", "seconds"]
    rows = []
    for row in report["cells"]:
        mean, low, high = row["token_acc"]
        cells = [row["defence"], row["view"], _layer(row["layer"]), row["attack"], row["set"], _share(mean)]
        cells += [f"{_share(low)} - {_share(high)}", _share(row["shifted_acc"]), f"{row['token_f1']:.3f}"]
        if has_text:
            cells += [f"{row['rouge1']:.3f}", f"{row['rougeL'][0]:.3f}", f"{row['bleu']:.1f}"]
        if has_entities:
            cells.append(_share(row["entity_recall"]) if "entity_recall" in row else "-")
        rows.append([*cells, len(row["per_seed"]), f"{row['seconds']:.1f}"])
    figures = table(columns, rows, num_text=5)
    return f"<details><summary>All figures ({len(rows)} rows)</summary>{figures}</details>"


def _settings(report: Mapping[str, Any]) -> str:
    tokens = ", ".join(f"{html.escape(part)} {count:,}" for part, count in report["tokens"].items())
    skipped = "".join(
        f"<li>Not run: <code>{html.escape(name)}</code>, because {html.escape(why)}.</li>"
        for name, why in report["skipped"].items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return (
        f"<h2>How it was "
        f"measured</h2><p>{html.escape(report['assumed'])}</p><ul><li>{report['num_layers']} layers of "
        f"width {report['width']}, vocabulary of {report['vocabulary']:,}; the last layer is read "
        f"{html.escape(report['last_layer'])}.</li><li>Tokens: "
        f"{tokens}.</li><li>{report['duplicate_embeddings']} "
        f"tokens share their embedding with another and cannot be told "
        f"apart.</li>{skipped}<li>{html.escape(versions)}"
        "</li></ul>"
    )


def render_page(report: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        report: What `scan` returned, or its JSON file read back.

    Returns:
        HTML without any outside resource.

    Raises:
        ValueError: If it is no report of a scan.
    """
    if not str(report.get("format", "")).startswith("embed_parrot.scan."):
        raise ValueError(f"this is no report of a leak scan: its keys are {', '.join(map(str, report))}.")
    title = f"What the hidden states of {report['model']} give away"
    body = "".join(
        part(report) for part in (_verdict, _charts, _heat, _defences, _meaning, _settings, _all_figures)
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{body}</html>\n"
    )
