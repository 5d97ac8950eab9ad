"""Curves of several evaluations in one figure."""

import pytest

from lcdist.report.curves import Axes, Line, plot_lines
from lcdist.report.svg import SERIES, FigureOptions


@pytest.mark.parametrize("count", [1, len(SERIES), len(SERIES) + 1])
def test_bands_are_drawn_where_curves_have_colours_of_their_own(count: int) -> None:
    lengths, value = [256, 512], [2.0, 3.0]
    lines = [Line(f"line {i}", lengths, value, [1.0, 2.0], [3.0, 4.0]) for i in range(count)]
    drawn = str(plot_lines(lines, Axes("tokens", "loss", lengths), FigureOptions("a", "b")))
    assert drawn.count("FillBetweenPolyCollection") == (count if count <= len(SERIES) else 0)
    assert all((f">line {i}<" in drawn) == (count > 1) for i in range(count))
