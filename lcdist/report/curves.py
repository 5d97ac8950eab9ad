"""Draw curves of several evaluations with their intervals, in the style of the report's figures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from lcdist.report.svg import DASHES, SERIES, STYLE, FigureOptions, set_round_ticks, to_svg

MARKERS = ("o", "s", "^", "D")
# A curve with more points has no marker at each of them.
MOST_MARKERS = 20


@dataclass(frozen=True)
class Line:
    """A curve: `y` over `x`, and where the intervals of y begin and end; NaN where unknown."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True)
class Axes:
    """The axes of a figure.

    Attributes:
        x, y: titles.
        x_ticks: labelled positions on a logarithmic axis; None: a linear axis.
        log_y: whether the y axis is logarithmic.
    """

    x: str
    y: str
    x_ticks: Sequence[int] | None = None
    log_y: bool = False


def interval_ends(
    intervals: Sequence[Sequence[float] | None],
) -> tuple[list[float], list[float]]:
    """Return the lower and the upper ends of intervals, NaN for None."""
    ends = [(math.nan, math.nan) if each is None else (each[0], each[1]) for each in intervals]
    return [low for low, _ in ends], [high for _, high in ends]


def plot_lines(lines: Sequence[Line], axes: Axes, options: FigureOptions) -> Markup:
    """Plot curves; each has its own colour, marker and dashes, and a band for its intervals.

    Where there are more curves than colours, bands would hide each other and are left out, and the
    legend stands beside the curves.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, NullLocator

    with matplotlib.rc_context(STYLE | {"svg.hashsalt": options.name}):
        figure = Figure(figsize=(6.8, 3.2), layout="constrained")
        ax = figure.subplots()
        crowded = len(lines) > len(SERIES)
        for index, line in enumerate(lines):
            turn, colour = divmod(index, len(SERIES))
            if not crowded:
                ax.fill_between(
                    line.x, line.low, line.high, color=SERIES[colour], alpha=0.15, linewidth=0
                )
            ax.plot(
                line.x,
                line.y,
                color=SERIES[colour],
                marker=MARKERS[colour] if len(line.x) <= MOST_MARKERS else None,
                markersize=5,
                linewidth=1.8,
                linestyle=DASHES[turn % len(DASHES)],
                label=line.label,
            )
        if crowded:
            figure.legend(frameon=False, loc="outside right upper")
        elif len(lines) > 1:
            ax.legend(frameon=False)
        if axes.x_ticks is None:
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        else:
            ax.set_xscale("log", base=2)
            ax.set_xticks(list(axes.x_ticks), [f"{tick:,}" for tick in axes.x_ticks])
            ax.xaxis.set_minor_locator(NullLocator())
        if axes.log_y and any(y > 0 for line in lines for y in line.y):
            ax.set_yscale("log")
            set_round_ticks(ax)
        ax.set_xlabel(axes.x)
        ax.set_ylabel(axes.y)
        return to_svg(figure, options)
