"""What an evaluation measured, as tables and figures: one `SectionKind` for each part.

`lcdist evaluate` prints the tables of one evaluation; the HTML page shows those of several side by
side, with figures.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lcdist.report.formatting import flatten, number
from lcdist.report.html import Figure, Table
from lcdist.report.svg import Curve, FigureOptions, plot_perplexity
from lcdist.report.task_sections import (
    needle_figures,
    needle_printed,
    needle_tables,
    passkey_figures,
    passkey_printed,
    passkey_tables,
    ruler_figures,
    ruler_printed,
    ruler_tables,
)

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


def printed_tables(measured: Mapping[str, Summary]) -> list[Table]:
    """Return the tables that the terminal shows of one evaluation, from its key `measured`."""
    return [table for name, summary in measured.items() for table in _kind(name).printed(summary)]


def sections(evaluations: Mapping[str, Mapping[str, Summary]]) -> list[Section]:
    """Return a section for each part that any of the evaluations has.

    Args:
        evaluations: the key `measured` of each evaluation, by the name to show for it.
    """
    names = dict.fromkeys(name for measured in evaluations.values() for name in measured)
    found = []
    for name in names:
        kind = _kind(name)
        results = {label: m[name] for label, m in evaluations.items() if name in m}
        found.append(
            Section(name, kind.title, kind.note, kind.figures(results), kind.tables(results))
        )
    return found


def _kind(name: str) -> SectionKind:
    """Return the section of a part; a plain one for a part that this version does not know."""
    if name in SECTIONS:
        return SECTIONS[name]

    def plain(summary: Summary) -> list[Table]:
        return [Table(("", "value"), flatten(summary))]

    def by_name(results: Mapping[str, Summary]) -> list[Table]:
        return [Table((label, "value"), flatten(each)) for label, each in results.items()]

    return SectionKind(name, "", plain, by_name, lambda results: [])


def with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    """Return a value with its interval, as a cell shows it: 12.3 (11.9 to 12.8)."""
    if interval is None or value is None:
        return number(value)
    return f"{number(value)} ({number(interval[0])} to {number(interval[1])})"


def _printed_perplexity(summary: Summary) -> list[Table]:
    rows = zip(summary["lengths"], summary["perplexity"], summary["scored"], strict=True)
    cells = [
        (str(length), "not finite" if value is None else f"{value:.3f}", f"{scored:,}")
        for length, value, scored in rows
    ]
    return [Table(("length", "perplexity", "tokens"), cells)]


def _perplexity_tables(results: Mapping[str, Summary]) -> list[Table]:
    lengths = sorted({length for each in results.values() for length in each["lengths"]})
    rows = []
    for length in lengths:
        cells = []
        for each in results.values():
            if length not in each["lengths"]:
                cells.append("")
                continue
            index = each["lengths"].index(length)
            cells.append(with_interval(each["perplexity"][index], each["interval"][index]))
        rows.append((f"{length:,}", *cells))
    return [Table(("length", *results), rows)]


def _perplexity_figures(results: Mapping[str, Summary]) -> list[Figure]:
    lengths = sorted({length for each in results.values() for length in each["lengths"]})
    curves = [
        Curve(
            label,
            each["lengths"],
            [math.nan if value is None else value for value in each["perplexity"]],
            index % 2,
        )
        for index, (label, each) in enumerate(results.items())
    ]
    options = FigureOptions("perplexity", "Perplexity by length; the table has its numbers.")
    svg = plot_perplexity(lengths, curves, options)
    return [Figure(svg, "Perplexity by length in tokens, both axes logarithmic.")]


SECTIONS: Mapping[str, SectionKind] = {
    "perplexity": SectionKind(
        "Perplexity by length",
        "The same held-out text in windows of each length. In brackets: the 95 % interval.",
        _printed_perplexity,
        _perplexity_tables,
        _perplexity_figures,
    ),
    "passkey": SectionKind(
        "Passkey retrieval by length",
        "A number of five digits in a text that repeats itself, at any depth. In brackets: the "
        "95 % interval.",
        passkey_printed,
        passkey_tables,
        passkey_figures,
    ),
    "needle": SectionKind(
        "Needle map",
        "A number of seven digits in a text, by length and depth. The table has the average of all "
        "depths, with its 95 % interval in brackets.",
        needle_printed,
        needle_tables,
        needle_figures,
    ),
    "ruler": SectionKind(
        "RULER",
        "Scores of the synthetic tasks of RULER (arXiv:2404.06654), in percent, with 95 % "
        "intervals in brackets. The effective length is the longest whose average reaches the "
        "threshold.",
        ruler_printed,
        ruler_tables,
        ruler_figures,
    ),
}
