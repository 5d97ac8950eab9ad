"""Draw the report's figures as inline SVG that uses the fonts and colours of the page.

Matplotlib draws with placeholder colours, which are then replaced by the page's CSS variables. The
same figure therefore works on a light and on a dark page, and its text is text of the page.
Matplotlib is imported when a figure is drawn, so importing this module is fast.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#010101", "#020202", "#030303"
SERIES = ("#040404", "#050505", "#060606", "#070707")
DASHES = ("-", "--", ":", "-.")
PLACEHOLDERS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    SERIES[0]: "var(--first)",
    SERIES[1]: "var(--second)",
    SERIES[2]: "var(--third)",
    SERIES[3]: "var(--fourth)",
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
MAX_POINTS = 600


@dataclass(frozen=True)
class Curve:
    """A line of a figure: `y` over `x`, in the colour of series number `series`, from 0.

    Beyond the fourth, colours come again with dashes.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    series: int = 0


@dataclass(frozen=True)
class FigureOptions:
    """Name and style of a figure.

    Attributes:
        name: unique on the page; prefix of the ids in the SVG.
        alt: alternative text.
        log: whether the y axis is logarithmic.
        smooth: whether to smooth the curves.
        small: whether the figure takes half the width of the page, without axis label and legend.
    """

    name: str
    alt: str
    log: bool = False
    smooth: bool = False
    small: bool = False


def plot_over_tokens(
    curves: Sequence[Curve], options: FigureOptions, marks: Sequence[float] = ()
) -> Markup:
    """Plot curves over the tokens trained on.

    Args:
        curves: the lines.
        options: name and style.
        marks: tokens at which the run was resumed, drawn as dotted lines.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(STYLE | {"svg.hashsalt": options.name}):
        figure = Figure(figsize=(3.3, 2.0) if options.small else (6.8, 3.0), layout="constrained")
        ax = figure.subplots()
        for curve in curves:
            _draw_curve(ax, curve, options.smooth)
        for mark in marks:
            ax.axvline(mark, color=MUTED, linewidth=0.8, linestyle=(0, (1, 3)))
        _scale_y_axis(ax, options.log)
        num_ticks = 4 if options.small else 7
        ax.xaxis.set_major_locator(MaxNLocator(num_ticks, steps=[1, 2, 2.5, 5, 10]))
        ax.xaxis.set_major_formatter(_tick_label)
        ax.margins(x=0.01)
        if not options.small:
            ax.set_xlabel("tokens trained on")
        if not options.small and len(curves) > 1:
            ax.legend(frameon=False, loc="upper right")
        return to_svg(figure, options)


def _scale_y_axis(ax: "Axes", log: bool) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator

    if log:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        ax.yaxis.set_major_formatter(_tick_label)
        ax.set_ylim(bottom=0)


def plot_perplexity(
    lengths: Sequence[int], curves: Sequence[Curve], options: FigureOptions
) -> Markup:
    """Plot perplexity by length, with logarithmic axes and a marker at every length."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    with matplotlib.rc_context(STYLE | {"svg.hashsalt": options.name}):
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
        set_round_ticks(ax)
        return to_svg(figure, options)


def _tick_label(value: float, _: float) -> str:
    """Return a tick label with a decimal prefix from a thousand on."""
    for step, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= step:
            return f"{value / step:g}{prefix}"
    return f"{value:g}"


def set_round_ticks(ax: Any) -> None:
    """Label a logarithmic y axis at round numbers; its limits stay as they are."""
    from matplotlib.ticker import NullFormatter, NullLocator

    low, high = ax.get_ylim()
    ticks = round_ticks(low, high)
    ax.set_yticks(ticks, [f"{tick:,g}" for tick in ticks])
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylim(low, high)


def round_ticks(low: float, high: float) -> list[float]:
    """Return ticks in [low, high]: 1, 2, 5 times the powers of ten, or the powers alone.

    If these are fewer than three, return evenly spaced numbers.
    """
    from matplotlib.ticker import MaxNLocator

    steps = (1, 2, 5) if high / low < 300 else (1,)
    candidates = [step * 10.0**power for power in range(-3, 13) for step in steps]
    ticks = [tick for tick in candidates if low <= tick <= high]
    if len(ticks) < 3:
        ticks = list(MaxNLocator(5).tick_values(low, high))
    return [tick for tick in ticks if low <= tick <= high]


def _draw_curve(ax: "Axes", curve: Curve, smooth: bool) -> None:
    """Draw a curve with at most about 2 `MAX_POINTS` points.

    If `smooth`, draw a moving average and the original curve in a lighter colour.
    """
    stride = max(1, len(curve.x) // MAX_POINTS)
    x, y = list(curve.x)[::stride], list(curve.y)[::stride]
    turn, number = divmod(curve.series, len(SERIES))
    colour, dashes = SERIES[number], DASHES[turn % len(DASHES)]
    if smooth and len(curve.y) > 20:
        ax.plot(x, y, color=colour, linewidth=0.8, alpha=0.35)
        radius = max(1, len(curve.y) // 80)
        y = [_local_mean(curve.y, index, radius) for index in range(0, len(curve.y), stride)]
    ax.plot(x, y, color=colour, linewidth=1.6, linestyle=dashes, label=curve.label)


def _local_mean(values: Sequence[float], index: int, radius: int) -> float:
    """Return the mean of the values at most `radius` positions from `index`."""
    window = values[max(0, index - radius) : index + radius + 1]
    return sum(window) / len(window)


def to_svg(figure: "Figure", options: FigureOptions) -> Markup:
    """Return an `<svg>` element without external resources, with ids unique on the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{options.name}-", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", text)
    text = re.sub(r"font: ([\d.]+)px '[^;\"]*", r"font: \1px var(--sans)", text)
    for placeholder, variable in PLACEHOLDERS.items():
        text = text.replace(placeholder, variable)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    label = Markup('<svg role="img" aria-label="{}"').format(options.alt)
    return Markup(text.replace("<svg", label, 1))
