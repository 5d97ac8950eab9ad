"""Draw a heat map as inline SVG: a grid of coloured cells with their values in them.

The colours are those of cividis, which people with every kind of colour vision see in the same
order, from dark blue to yellow (Nuñez, Anderton, Renslow, 2018). They are the same on a light and
on a dark page; labels have the page's colours. Matplotlib is imported when a map is drawn.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

CELL_WIDTH, CELL_HEIGHT, TOP, BOTTOM, GAP = 62, 26, 22, 46, 2
# Least width of the labels of rows, and what a character of them takes at most.
LEFT, CHARACTER = 92, 6.8
FONT = "font-family: var(--sans); font-size: 11px"
KEY_STEPS = 24


@dataclass(frozen=True)
class Axis:
    """An axis of a heat map: its title and the label of each row or column."""

    title: str
    labels: Sequence[str]


def heat_map(
    rows: Axis,
    columns: Axis,
    values: Sequence[Sequence[float | None]],
    alt: str,
    scale: tuple[float, float] = (0.0, 1.0),
    texts: Sequence[Sequence[str]] | None = None,
) -> Markup:
    """Return the `<svg>` element of a heat map.

    Args:
        rows: from top to bottom.
        columns: from left to right.
        values: one row of numbers for each label of `rows`; None and NaN leave a cell empty, with a
            dash.
        alt: alternative text.
        scale: values of the darkest and of the lightest colour; values beyond get these colours.
        texts: what is written into the cells; by default the values as percentages.
    """
    if len(values) != len(rows.labels) or any(len(v) != len(columns.labels) for v in values):
        raise ValueError("a heat map needs a value for each row and column")
    left = max(LEFT, 10 + round(CHARACTER * max(map(len, rows.labels), default=0)))
    width = left + CELL_WIDTH * len(columns.labels) + GAP
    height = TOP + CELL_HEIGHT * len(rows.labels) + BOTTOM
    parts = [_text(left, 13, columns.title, "start"), _text(left - 8, 13, rows.title, "end")]
    for i, label in enumerate(rows.labels):
        y = TOP + CELL_HEIGHT * i
        parts.append(_text(left - 8, y + 17, label, "end", "var(--ink)"))
        for j, value in enumerate(values[i]):
            text = texts[i][j] if texts is not None else None
            parts.append(_cell(left + CELL_WIDTH * j, y, value, scale, text))
    below = TOP + CELL_HEIGHT * len(rows.labels) + 14
    for j, label in enumerate(columns.labels):
        middle = left + CELL_WIDTH * j + (CELL_WIDTH - GAP) / 2
        parts.append(_text(middle, below, label, "middle", "var(--ink)"))
    parts.append(_key(left, below + 10, scale))
    # Small maps are not blown up to the width of the page.
    head = Markup('<svg role="img" aria-label="{}" viewBox="0 0 {} {}" style="max-width: {}px">')
    return head.format(alt, width, height, width) + Markup("").join(parts) + Markup("</svg>")


def _cell(
    x: float, y: float, value: float | None, scale: tuple[float, float], text: str | None
) -> Markup:
    size = Markup('x="{}" y="{}" width="{}" height="{}"').format(
        x, y, CELL_WIDTH - GAP, CELL_HEIGHT - GAP
    )
    middle = x + (CELL_WIDTH - GAP) / 2
    if value is None or not math.isfinite(value):
        empty = Markup('<rect {} fill="none" stroke="var(--grid)"/>').format(size)
        return empty + _text(middle, y + 16, text or "–", "middle")
    colour, is_light = _colour(value, scale)
    text = f"{100 * value:.0f}%" if text is None else text
    ink = "#111111" if is_light else "#ffffff"
    rectangle = Markup('<rect {} rx="2" fill="{}"/>').format(size, colour)
    return rectangle + _text(middle, y + 16, text, "middle", ink)


def _colour(value: float, scale: tuple[float, float]) -> tuple[str, bool]:
    """Return the colour of a value, and whether dark text is easier to read on it."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    low, high = scale
    share = (value - low) / (high - low) if high > low else 1.0
    red, green, blue, _ = colormaps["cividis"](min(1.0, max(0.0, share)))
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)
    ]
    # Relative luminance of WCAG 2; black and white have the same contrast at 0.179.
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return to_hex((red, green, blue)), luminance > 0.179


def _key(left: float, y: float, scale: tuple[float, float]) -> Markup:
    """Return a bar of the colours with the values at its ends."""
    low, high = scale
    width = 4
    cells = [
        Markup('<rect x="{}" y="{}" width="{}" height="8" fill="{}"/>').format(
            left + 34 + width * k, y, width + 0.5, _colour(k / (KEY_STEPS - 1), (0, 1))[0]
        )
        for k in range(KEY_STEPS)
    ]
    ends = (f"{low:.0%}", f"{high:.0%}") if scale == (0.0, 1.0) else (f"{low:g}", f"{high:g}")
    texts = [
        _text(left + 28, y + 8, ends[0], "end"),
        _text(left + 40 + width * KEY_STEPS, y + 8, ends[1], "start"),
    ]
    return Markup("").join([*cells, *texts])


def _text(x: float, y: float, text: str, anchor: str, fill: str = "var(--muted)") -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}" fill="{}" style="{}">{}</text>').format(
        f"{x:g}", f"{y:g}", anchor, fill, FONT, escape(text)
    )
