"""Show evaluations as tables and figures: one `SectionKind` for each part.

`lcdist evaluate` prints the tables of one evaluation; the HTML page shows those of several side by
side, with figures.
"""

from collections.abc import Mapping

from lcdist.report.formatting import flatten
from lcdist.report.html import Table
from lcdist.report.section import Section, SectionKind, Summary
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
from lcdist.report.text_sections import LONGPPL, PERPLEXITY, POSITION

SECTIONS: Mapping[str, SectionKind] = {
    "perplexity": PERPLEXITY,
    "position": POSITION,
    "longppl": LONGPPL,
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


def check_shown(name: str, summary: Summary) -> None:
    """Make the tables of a part; raises whatever goes wrong with a summary that is damaged."""
    _kind(name).printed(summary)
    _kind(name).tables({"": summary})


def _kind(name: str) -> SectionKind:
    """Return the section of a part; a plain one for a part that this version does not know."""
    if name in SECTIONS:
        return SECTIONS[name]

    def plain(summary: Summary) -> list[Table]:
        return [Table(("", "value"), flatten(summary))]

    def by_name(results: Mapping[str, Summary]) -> list[Table]:
        return [Table((label, "value"), flatten(each)) for label, each in results.items()]

    return SectionKind(name, "", plain, by_name, lambda results: [])
