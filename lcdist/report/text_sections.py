"""Sections of what is measured on held-out text: perplexity, loss by position, LongPPL."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lcdist.report.curves import Axes, Line, interval_ends, plot_lines
from lcdist.report.formatting import number, percent
from lcdist.report.html import Figure, Table
from lcdist.report.section import SectionKind, Summary, with_interval
from lcdist.report.svg import FigureOptions
from lcdist.utils.intervals import exp_interval, mean_interval, perplexity_of

# Rows of a table of positions on a page; the figure has all bins.
MOST_ROWS = 8
NOT_FINITE = "not finite"


def _gaps(values: Sequence[float | None]) -> list[float]:
    """Return values for a curve, which has a gap where one is missing."""
    return [math.nan if value is None else value for value in values]


def _printed_perplexity(summary: Summary) -> list[Table]:
    rows = zip(summary["lengths"], summary["perplexity"], summary["scored"], strict=True)
    cells = [
        (str(length), NOT_FINITE if value is None else f"{value:.3f}", f"{scored:,}")
        for length, value, scored in rows
    ]
    return [Table(("length", "perplexity", "tokens"), cells)]


def _perplexity_tables(results: Mapping[str, Summary]) -> list[Table]:
    rows = []
    for length in _all_lengths(results):
        cells = []
        for each in results.values():
            if length not in each["lengths"]:
                cells.append("")
                continue
            index = each["lengths"].index(length)
            value = each["perplexity"][index]
            cells.append(
                NOT_FINITE if value is None else with_interval(value, each["interval"][index])
            )
        rows.append((f"{length:,}", *cells))
    return [Table(("length", *results), rows), *_perplexity_ratios(results)]


def _perplexity_ratios(results: Mapping[str, Summary]) -> list[Table]:
    """Return how perplexities compare with the first evaluation's, where the text is the same.

    Both meet the same easy and hard stretches of text, so that the interval of their ratio is far
    narrower than each one's own.
    """
    labels = list(results)
    first = results[labels[0]]
    same = [
        label
        for label in labels[1:]
        if first.get("text") and results[label].get("text") == first["text"]
        and results[label]["lengths"] == first["lengths"]
    ]  # fmt: skip
    if not same:
        return []
    rows = []
    for index, length in enumerate(first["lengths"]):
        ratios = [
            _ratio(first["stretches"][index], results[label]["stretches"][index]) for label in same
        ]
        rows.append((f"{length:,}", *ratios))
    return [Table(("length", *(f"{label} / {labels[0]}" for label in same)), rows)]


def _ratio(before: Sequence[Sequence[Any]], after: Sequence[Sequence[Any]]) -> str:
    """Return the ratio of two perplexities with its interval, from the nats of their stretches."""
    differences = [
        math.nan if a[1] is None or b[1] is None else a[1] - b[1]
        for b, a in zip(before, after, strict=True)
    ]
    mean, interval = mean_interval([each[0] for each in before], differences)
    return with_interval(perplexity_of(mean), exp_interval(interval))


def _perplexity_figures(results: Mapping[str, Summary]) -> list[Figure]:
    lines = [
        Line(label, each["lengths"], _gaps(each["perplexity"]), *interval_ends(each["interval"]))
        for label, each in results.items()
    ]
    axes = Axes("length in tokens", "perplexity", _all_lengths(results), log_y=True)
    options = FigureOptions("perplexity", "Perplexity by length; the table has its numbers.")
    return [Figure(plot_lines(lines, axes, options), "Both axes are logarithmic.")]


def _all_lengths(results: Mapping[str, Summary]) -> list[int]:
    return sorted({length for each in results.values() for length in each["lengths"]})


def _printed_position(summary: Summary) -> list[Table]:
    keys = ("first", "last", "loss", "interval", "scored")
    rows = []
    for first, last, loss, interval, scored in zip(*map(summary.get, keys), strict=True):
        value = NOT_FINITE if loss is None else f"{loss:.4f}"
        rows.append((_span(first, last), value, _range(interval, 4), f"{scored:,}"))
    return [Table(("tokens before", "loss", "95 %", "tokens"), rows)]


def _range(interval: Sequence[float] | None, digits: int) -> str:
    """Return an interval for the terminal; empty if there is none."""
    return "" if interval is None else f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"


def _span(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def _position_tables(results: Mapping[str, Summary]) -> list[Table]:
    """Return some of the bins; evaluations with other bins get a table of their own."""
    tables = []
    same_bins: dict[tuple[int, ...], list[str]] = {}
    for label, each in results.items():
        same_bins.setdefault((*each["first"], *each["last"]), []).append(label)
    for labels in same_bins.values():
        one = results[labels[0]]
        count = len(one["first"])
        shown = sorted({round(i * (count - 1) / (MOST_ROWS - 1)) for i in range(MOST_ROWS)})
        rows = [
            (
                _span(one["first"][i], one["last"][i]),
                *(
                    with_interval(results[label]["loss"][i], results[label]["interval"][i])
                    for label in labels
                ),
            )
            for i in shown
        ]
        tables.append(Table(("tokens before", *labels), rows))
    return tables


def _position_figures(results: Mapping[str, Summary]) -> list[Figure]:
    lines = [
        Line(
            label,
            [(first + last) / 2 for first, last in zip(each["first"], each["last"], strict=True)],
            _gaps(each["loss"]),
            *interval_ends(each["interval"]),
        )
        for label, each in results.items()
    ]
    options = FigureOptions("position", "Loss by position; the table has some of its numbers.")
    svg = plot_lines(lines, Axes("tokens before, in the window", "loss (nats per token)"), options)
    return [Figure(svg, "Mean loss of each bin of positions, with its 95 % interval.")]


def _printed_longppl(summary: Summary) -> list[Table]:
    value = summary["longppl"]
    row = (
        str(summary["length"]),
        _why_missing(summary) if value is None else f"{value:.3f}",
        _range(summary["interval"], 3),
        f"{summary['key_tokens']:,} of {summary['in_reach']:,}",
        "" if summary["perplexity"] is None else f"{summary['perplexity']:.3f}",
    )
    head = ("length", "LongPPL", "95 %", "key tokens", "perplexity")
    return [Table(head, [row])]


def _why_missing(summary: Summary) -> str:
    return NOT_FINITE if summary["not_finite"] or summary["key_tokens"] else "no key token"


def _longppl_tables(results: Mapping[str, Summary]) -> list[Table]:
    rows = []
    for label, each in results.items():
        value = each["longppl"]
        share = math.nan if each["key_share"] is None else each["key_share"]
        rows.append(
            (
                label,
                _why_missing(each) if value is None else with_interval(value, each["interval"]),
                f"{each['key_tokens']:,} ({percent(share)})",
                with_interval(each["perplexity"], each["perplexity_interval"]),
                f"{each['length']:,}",
                each["marker"] or "itself",
                f"{each['short_context']:,} + {each['short_step']:,}",
                f"{number(each['key_gain'])} / {number(each['key_loss'])}",
            )
        )
    head = ("", "LongPPL", "key tokens", "perplexity", "length")
    return [Table((*head, "marked by", "short context", "gain / loss"), rows)]


PERPLEXITY = SectionKind(
    "Perplexity by length",
    "The same held-out text in windows of each length. In brackets: the 95 % interval. The ratio "
    "of two perplexities of the same text is more certain than each of them.",
    _printed_perplexity,
    _perplexity_tables,
    _perplexity_figures,
)
POSITION = SectionKind(
    "Loss by position",
    "Windows of the longest length: the loss falls with the number of tokens before as long as the "
    "model uses them.",
    _printed_position,
    _position_tables,
    _position_figures,
)
LONGPPL = SectionKind(
    "LongPPL",
    "The perplexity of key tokens: those that long context makes likely and short context does not "
    "(arXiv:2410.23771). Evaluations with other markers, lengths or thresholds score other tokens.",
    _printed_longppl,
    _longppl_tables,
    lambda results: [],
)
