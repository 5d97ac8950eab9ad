"""A section of a page about evaluations, and how a part of an evaluation becomes one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lcdist.report.formatting import number
from lcdist.report.html import Figure, Table

# The summary of one part, as `lcdist evaluate` writes it.
Summary = Mapping[str, Any]


@dataclass(frozen=True)
class SectionKind:
    """How the figures of a part are shown.

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
    """Return a value with its interval, as a cell shows it: 12.3 (11.9 to 12.8)."""
    if interval is None or value is None:
        return number(value)
    return f"{number(value)} ({number(interval[0])} to {number(interval[1])})"
