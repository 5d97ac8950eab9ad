"""The figures of a report, as SVG that stands inside the page and takes its colours from it.

Matplotlib draws with stand-in colours, which become the page's CSS variables afterwards; so one
figure serves a light page and a dark one, and its text is the page's text.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

INK, MUTED, GRID = "#010101", "#020202", "#030303"
SERIES = ("#040404", "#050505")
STAND_INS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    SERIES[0]: "var(--first)",
    SERIES[1]: "var(--second)",
}
STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.solid_capstyle": "round",
}
MOST_POINTS = 600


@dataclass(frozen=True)
class Curve:
    """One line of a figure: `y` over `x`, in the colour of series number `series` (0 or 1)."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    series: int = 0


@dataclass(frozen=True)
class Looks:
    """What a figure over tokens is called and how it is scaled. alt: what it shows, in words."""

    name: str
    alt: str
    log: bool = False
    smooth: bool = False
    small: bool = False


def over_tokens(curves: Sequence[Curve], looks: Looks, marks: Sequence[float] = ()) -> str:
    """SVG of curves over the tokens trained on; `marks` are where the run was resumed."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": looks.name}):
        figure = Figure(figsize=(3.3, 2.0) if looks.small else (6.8, 3.0), layout="constrained")
        ax = figure.subplots()
        for curve in curves:
            _draw(ax, curve, looks.smooth)
        for mark in marks:
            ax.axvline(mark, color=MUTED, linewidth=0.8, linestyle=(0, (1, 3)))
        if looks.log:
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
            ax.yaxis.set_minor_locator(NullLocator())
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        else:
            ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
            ax.yaxis.set_major_formatter(FuncFormatter(_tick))
            ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(4 if looks.small else 7, steps=[1, 2, 2.5, 5, 10]))
        ax.xaxis.set_major_formatter(FuncFormatter(_tick))
        ax.margins(x=0.01)
        if not looks.small:
            ax.set_xlabel("tokens trained on")
        if not looks.small and len(curves) > 1:
            ax.legend(frameon=False, loc="upper right")
        return _svg(figure, looks)


def perplexity(lengths: Sequence[int], curves: Sequence[Curve], looks: Looks) -> str:
    """SVG of perplexity by length, both axes logarithmic, each curve named at its end."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": looks.name}):
        figure = Figure(figsize=(6.8, 3.2), layout="constrained")
        ax = figure.subplots()
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        for curve in curves:
            ax.plot(
                curve.x,
                curve.y,
                color=SERIES[curve.series],
                marker=("s", "o")[curve.series],
                markersize=5,
                linewidth=1.8,
                linestyle=("--", "-")[curve.series],
                label=curve.label,
            )
        ax.legend(frameon=False, loc="upper left")
        ax.set_xticks(list(lengths), [f"{length:,}" for length in lengths])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel("length in tokens")
        ax.set_ylabel("perplexity")
        low, high = ax.get_ylim()
        ticks = _round_numbers(low, high)
        ax.set_yticks(ticks, [f"{tick:,g}" for tick in ticks])
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.yaxis.set_minor_locator(NullLocator())
        ax.set_ylim(low, high)
        return _svg(figure, looks)


def _tick(value: float, _: int) -> str:
    """A number of an axis, with a decimal prefix from a thousand on."""
    for step, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= step:
            return f"{value / step:g}{prefix}"
    return f"{value:g}"


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2, 5 of each power of ten, or 1 alone; evenly spaced numbers where those are too few."""
    steps = (1, 2, 5) if high / low < 300 else (1,)
    every = [step * 10.0**power for power in range(-3, 13) for step in steps]
    ticks = [tick for tick in every if low <= tick <= high]
    if len(ticks) < 3:
        ticks = list(MaxNLocator(5).tick_values(low, high))
    return [tick for tick in ticks if low <= tick <= high]


def _draw(ax: Axes, curve: Curve, smooth: bool) -> None:
    """A curve thinned to what a page can show; smoothed, the thinned one stays as a shadow."""
    every = max(1, len(curve.x) // MOST_POINTS)
    x, y = list(curve.x)[::every], list(curve.y)[::every]
    colour = SERIES[curve.series]
    if smooth and len(curve.y) > 20:
        ax.plot(x, y, color=colour, linewidth=0.8, alpha=0.35)
        reach = max(1, len(curve.y) // 80)
        y = [_local_mean(curve.y, place, reach) for place in range(0, len(curve.y), every)]
    ax.plot(x, y, color=colour, linewidth=1.6, label=curve.label)


def _local_mean(values: Sequence[float], place: int, reach: int) -> float:
    """The mean of the values at most `reach` places from `place`."""
    part = values[max(0, place - reach) : place + reach + 1]
    return sum(part) / len(part)


def _svg(figure: Figure, looks: Looks) -> str:
    """The figure as an `<svg>` element that names no outside resource and no shared id."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{looks.name}-", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", text)
    text = re.sub(r"font: ([\d.]+)px '[^;\"]*", r"font: \1px var(--sans)", text)
    for stand_in, variable in STAND_INS.items():
        text = text.replace(stand_in, variable)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(looks.alt)}"', 1)
