"""A section of a page about evaluations, and how a part of an evaluation becomes one."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lcdist.report.formatting import number
from lcdist.report.html import Figure, Table

# The summary of one part, as `lcdist evaluate` writes it.
Summary = Mapping[str, Any]


@dataclass(frozen=True)
class SectionKind:
    """Describe how the figures of a part are shown.

    Attributes:
        title: of the section.
        note: one or two sentences that say what is shown.
        printed: tables of one summary for the terminal.
        tables: tables of several summaries, by the name of each evaluation.
        figures: figures of several summaries, by the name of each evaluation.
    """

    title: str
    note: str
    printed: Callable[[Summary], list[Table]]
    tables: Callable[[Mapping[str, Summary]], list[Table]]
    figures: Callable[[Mapping[str, Summary]], list[Figure]]


@dataclass(frozen=True)
class Section:
    """A section of a page."""

    name: str
    title: str
    note: str
    figures: Sequence[Figure]
    tables: Sequence[Table]


def with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    """Return a value with its interval, as a cell shows it: 12.34 (11.90 to 12.80)."""
    if interval is None or value is None:
        return _figure(value)
    return f"{_figure(value)} ({_figure(interval[0])} to {_figure(interval[1])})"


def _figure(value: float | None) -> str:
    """Return a number with four significant digits, or as `number` does if it is large or tiny."""
    if value is None or not 1e-3 <= abs(value) < 1e4:
        return number(value)
    return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"
