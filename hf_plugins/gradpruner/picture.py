"""A picture of layer scores and of what the plan does with each layer, as SVG text."""

import math

from hf_plugins.gradpruner.plan import PruningPlan

COLOURS = {"kept": "#4c78a8", "dropped": "#d9d9d9", "merged": "#f58518"}
WIDTH, HEIGHT, LEFT, TOP = 720, 300, 60, 50


def _fate(plan: PruningPlan, layer: int) -> str:
    if layer in dict(plan.merged):
        return "merged"
    return "dropped" if layer in plan.dropped else "kept"


def _heights(scores: tuple[float, ...]) -> list[float]:
    positive = [score for score in scores if score > 0]
    if not positive:
        return [0.0] * len(scores)
    low, high = math.log10(min(positive)) - 0.3, math.log10(max(positive))
    span = max(high - low, 1e-9)
    return [max(0.0, (math.log10(score) - low) / span) if score > 0 else 0.0 for score in scores]


def scores_svg(plan: PruningPlan) -> str:
    """One bar a layer on a logarithmic axis; arrows lead from merged layers to their receivers.

    Args:
        plan: A plan with scores; without them all bars have one height.

    Returns:
        A whole SVG file.
    """
    scores = plan.scores or (1.0,) * plan.num_layers
    step = (WIDTH - LEFT - 20) / plan.num_layers
    base = HEIGHT - 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">Layer scores ({plan.method}), logarithmic: '
        f"{len(plan.dropped)} of {plan.num_layers} layers go, {len(plan.merged)} of them merged</text>",
        f'<text x="12" y="{base}">{min(scores):.1e}</text><text x="12" '
        f'y="{TOP + 8}">{max(scores):.1e}</text>',
    ]
    for layer, height in enumerate(_heights(scores)):
        x, tall = LEFT + layer * step, max(2.0, height * (base - TOP))
        parts.append(
            f'<rect x="{x + 0.1 * step:.1f}" y="{base - tall:.1f}" width="{0.8 * step:.1f}" '
            f'height="{tall:.1f}" '
            f'fill="{COLOURS[_fate(plan, layer)]}"><title>layer {layer}: {scores[layer]:.3e}, '
            f"{_fate(plan, layer)}</title></rect>"
        )
        parts.append(f'<text x="{x + 0.5 * step:.1f}" y="{base + 14}" text-anchor="middle">{layer}</text>')
    for donor, receiver in plan.merged:
        start, end = (LEFT + (layer + 0.5) * step for layer in (donor, receiver))
        parts.append(
            f'<path d="M {start:.1f} {TOP - 4} Q {(start + end) / 2:.1f} {TOP - 22} {end:.1f} {TOP - 4}" '
            'fill="none" '
            'stroke="#f58518" stroke-width="1.5"/>'
        )
    for place, (fate, colour) in enumerate(COLOURS.items()):
        x = LEFT + 90 * place
        parts.append(f'<rect x="{x}" y="{HEIGHT - 14}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 14}" y="{HEIGHT - 5}">{fate}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
