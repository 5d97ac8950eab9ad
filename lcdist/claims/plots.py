"""Plots of the claims, as files: perplexity by length for each paper, and curves of training."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from lcdist.claims.claim import Figure, Measured
from lcdist.report.curves import Axes, Line, plot_lines
from lcdist.report.svg import FigureOptions
from lcdist.utils.atomic import write_file

# Readings of each plot, by its name.
GROUPS = {
    "coca": ("full", "full-ntk", "coca-slack", "coca-slack-ntk", "coca-strict", "coca-strict-ntk"),
    "lssar": (
        *("full", "length-scaled", "lssa", "lssa-read-p15", "lssar-p3", "lssar-p3-read-p15"),
        *("lssar-p15", "lssar-growing", "lssar-staged"),
    ),
    "scca": ("full", "extend-full", "extend-s2", "extend-fixed", "extend-flow", "extend-longmixed"),
    "tensorized": ("full", "tensorized-mode", "tensorized-global", "tensorized-layers"),
    "landmark": ("full", "landmark", "landmark-k1", "landmark-k2", "landmark-k4", "landmark-k8"),
}
TRAINED = ("full", "length-scaled", "lssa", "lssar-p3")
TRAINED += ("lssar-p15", "lssar-growing", "lssar-staged")
# A file has no page whose colours it could use: these are legible on white and on dark grey.
_COLOURS = {
    "ink": "#57606a",
    "muted": "#7d8590",
    "grid": "#7d859044",
    "first": "#2f81f7",
    "second": "#d4552b",
    "third": "#2da44e",
    "fourth": "#a371f7",
    "sans": "sans-serif",
}


def write_plots(folder: Path, measured: Measured) -> dict[str, str]:
    """Write the plots of what was measured; return title and file name of each."""
    written = {}
    for name, readings in GROUPS.items():
        known = {r: measured.readings[r].perplexity for r in readings if r in measured.readings}
        lines = [_line(label, figures) for label, figures in known.items() if figures]
        if lines:
            lengths = sorted({length for figures in known.values() for length in figures})
            axes = Axes("length in tokens", "perplexity", lengths, log_y=True)
            title = f"Perplexity by length: {name}"
            written[title] = _write(folder, name, title, lines, axes)
    curves = {
        name: measured.trainings[name].curve for name in TRAINED if name in measured.trainings
    }
    if curves:
        lines = []
        for name, curve in curves.items():
            unknown = [math.nan] * len(curve)
            tokens, losses = [float(n) for n, _ in curve], [loss for _, loss in curve]
            lines.append(Line(name, tokens, losses, unknown, unknown))
        title = "Loss by tokens trained on"
        written[title] = _write(
            folder, "training", title, lines, Axes("tokens trained on", "training loss")
        )
    return written


def _line(label: str, figures: Mapping[int, Figure]) -> Line:
    rows = sorted(figures.items())
    values = [figure for _, figure in rows]
    return Line(
        label,
        [length for length, _ in rows],
        [figure.value for figure in values],
        [figure.low for figure in values],
        [figure.high for figure in values],
    )


def _write(folder: Path, name: str, title: str, lines: Sequence[Line], axes: Axes) -> str:
    """Write one plot as a file that stands alone; return its name."""
    drawn = str(plot_lines(lines, axes, FigureOptions(name, title)))
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    style = ";".join(f"--{key}:{value}" for key, value in _COLOURS.items())
    write_file(folder / f"{name}.svg", drawn.replace("<svg", f'<svg {names} style="{style}"', 1))
    return f"{name}.svg"
