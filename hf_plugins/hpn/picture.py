"""The chosen hyper-parameters of every client as an SVG: a row each, clients from left to right."""

from collections.abc import Mapping
from html import escape
from typing import Any

_LEFT, _STEP, _ROW, _GAP = 170, 18, 16, 26


def picture(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """Draw configs.

    Args:
        configs: Client to config.

    Returns:
        SVG: for each hyper-parameter one line per value that was chosen, a dot under each client that has it.

    Raises:
        ValueError: If there is no client.
    """
    if not configs:
        raise ValueError("there are no configs to draw; the search found none.")
    clients = sorted(configs, key=lambda name: (len(name), name))
    names = list(dict.fromkeys(name for config in configs.values() for name in config))
    parts, y = [], 30
    for name in names:
        values = sorted({c[name] for c in configs.values() if name in c}, key=lambda v: (str(type(v)), v))
        parts.append(f'<text x="8" y="{y}" font-weight="bold">{escape(name)}</text>')
        for value in values:
            y += _ROW
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            parts.append(f'<text x="{_LEFT - 12}" y="{y}" text-anchor="end">{escape(shown)}</text>')
            parts += [
                f'<circle cx="{_LEFT + _STEP * i}" cy="{y - 4}" r="5" fill="#3b6ea8"/>'
                for i, client in enumerate(clients)
                if configs[client].get(name, _NOTHING) == value
            ]
        y += _GAP
    parts += [
        f'<text x="{_LEFT + _STEP * i}" y="{y}" text-anchor="middle">{escape(client)}</text>'
        for i, client in enumerate(clients)
    ]
    width, height = _LEFT + _STEP * len(clients) + 10, y + 12
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
    return f'{head} font-family="sans-serif" font-size="11">\n' + "\n".join(parts) + "\n</svg>\n"


class _Nothing:
    pass


_NOTHING = _Nothing()
