"""Tables and figures of synthetic tasks: passkey, needle map and RULER."""

from collections.abc import Mapping, Sequence
from typing import Any

from lcdist.report.heat_map import Axis, heat_map
from lcdist.report.html import Figure, Table

Summary = Mapping[str, Any]


def passkey_printed(summary: Summary) -> list[Table]:
    """Return the table of one evaluation."""
    rows = [
        (f"{length:,}", percent(accuracy, interval), f"{cases:,}")
        for length, accuracy, interval, cases in zip(
            *(summary[key] for key in ("lengths", "accuracy", "interval", "cases")), strict=True
        )
    ]
    rows += _too_short_rows(summary, 3)
    return [Table(("length", "passkey found", "cases"), rows)]


def passkey_tables(results: Mapping[str, Summary]) -> list[Table]:
    """Return a table of lengths and evaluations."""
    return [_by_length(results, "accuracy", 1.0)]


def passkey_figures(results: Mapping[str, Summary]) -> list[Figure]:
    """Return a map of evaluations and lengths."""
    lengths = _lengths(results)
    rows = [_at(each["lengths"], each["accuracy"], lengths) for each in results.values()]
    svg = heat_map(
        Axis("", [_named(label, each) for label, each in results.items()]),
        Axis("length in tokens", [f"{n:,}" for n in lengths]),
        rows,
        "Passkeys found by length; the table has its numbers.",
    )
    return [Figure(svg, "Share of passkeys that were found.")]


def needle_printed(summary: Summary) -> list[Table]:
    """Return the map of one evaluation as a table."""
    head = ("depth", *(f"{length:,}" for length in summary["lengths"]))
    rows = [
        (f"{depth:.0%}", *(percent(value) for value in values))
        for depth, values in zip(summary["depths"], summary["accuracy"], strict=True)
    ]
    averages = zip(summary["average"], summary["interval"], strict=True)
    rows.append(("all", *(percent(value, interval) for value, interval in averages)))
    return [Table(head, [*rows, *_too_short_rows(summary, len(head))])]


def needle_tables(results: Mapping[str, Summary]) -> list[Table]:
    """Return a table of lengths and evaluations: the average of all depths."""
    return [_by_length(results, "average", 1.0)]


def needle_figures(results: Mapping[str, Summary]) -> list[Figure]:
    """Return a map of depths and lengths for each evaluation."""
    return [
        Figure(
            heat_map(
                Axis("depth", [f"{depth:.0%}" for depth in each["depths"]]),
                Axis("length in tokens", [f"{n:,}" for n in each["lengths"]]),
                each["accuracy"],
                f"{label}: needles found by depth and length; the terminal prints its numbers.",
            ),
            f"{_named(label, each)}: share of needles found in {each['text']}, {each['cases']} in "
            "each cell.",
        )
        for label, each in results.items()
    ]


def ruler_printed(summary: Summary) -> list[Table]:
    """Return the scores of one evaluation, and its effective length."""
    head = ("RULER", *(f"{length:,}" for length in summary["lengths"]))
    rows = [(task, *_scores(task, summary)) for task in summary["tasks"]]
    average = summary["average"]
    cells = zip(average["score"], average["interval"], strict=True)
    rows.append(("average", *(percent(score, interval, 100.0) for score, interval in cells)))
    rows += [(task, *["no text"] * (len(head) - 1)) for task in summary["left_out"]]
    effective = f"effective length (average of at least {summary['threshold']:g})"
    return [Table(head, rows), Table((effective,), [(effective_text(summary),)])]


def ruler_tables(results: Mapping[str, Summary]) -> list[Table]:
    """Return averages and effective lengths of all evaluations, then the tasks of each."""
    lengths = _lengths(results)
    rows = []
    for label, each in results.items():
        average = each["average"]
        scores = _at(each["lengths"], average["score"], lengths)
        intervals = _at(each["lengths"], average["interval"], lengths)
        cells = [percent(s, i, 100.0) for s, i in zip(scores, intervals, strict=True)]
        rows.append((_named(label, each), f"{len(each['tasks'])}", *cells, effective_text(each)))
    head = ("average", "tasks", *(f"{n:,}" for n in lengths), "effective length")
    return [Table(head, rows), *(_tasks(label, each) for label, each in results.items())]


def ruler_figures(results: Mapping[str, Summary]) -> list[Figure]:
    """Return a map of tasks and lengths for each evaluation."""
    return [
        Figure(
            heat_map(
                Axis("task", [*each["tasks"], "average"]),
                Axis("length in tokens", [f"{n:,}" for n in each["lengths"]]),
                [
                    [None if score is None else score / 100 for score in row["score"]]
                    for row in (*each["tasks"].values(), each["average"])
                ],
                f"{label}: scores by task and length; the table has its numbers.",
            ),
            f"{_named(label, each)}: score of each task. A dash: no case is so short.",
        )
        for label, each in results.items()
    ]


def effective_text(summary: Summary) -> str:
    """Return the effective length of an evaluation in words."""
    if summary["effective_length"] is not None:
        return f"{summary['effective_length']:,}"
    scores = zip(summary["lengths"], summary["average"]["score"], strict=True)
    shortest = min((length for length, score in scores if score is not None), default=None)
    return "not measured" if shortest is None else f"less than {shortest:,}"


def percent(
    value: float | None, interval: Sequence[float] | None = None, whole: float = 1.0
) -> str:
    """Return a share as a cell shows it: 92% (84 to 97); a dash for None."""
    if value is None:
        return "–"
    text = f"{100 * value / whole:.3g}%"
    if not interval:
        return text
    low, high = (f"{100 * end / whole:.0f}" for end in interval)
    return f"{text} ({low} to {high})"


def _scores(task: str, summary: Summary) -> list[str]:
    """Return the scores of a task, or what its shortest case takes."""
    needed = {
        each["length"]: f"takes {each['needed']:,}"
        for each in summary["too_short"]
        if each["task"] == task
    }
    scores = zip(summary["lengths"], summary["tasks"][task]["score"], strict=True)
    return [needed.get(length) or percent(score, None, 100.0) for length, score in scores]


def _tasks(label: str, summary: Summary) -> Table:
    """Return the scores of one evaluation by task, with their intervals."""
    rows = []
    for task, row in summary["tasks"].items():
        cells = zip(row["score"], row["interval"], strict=True)
        rows.append((task, *(percent(score, interval, 100.0) for score, interval in cells)))
    return Table((_named(label, summary), *(f"{n:,}" for n in summary["lengths"])), rows)


def _by_length(results: Mapping[str, Summary], key: str, whole: float) -> Table:
    lengths = _lengths(results)
    columns = []
    for each in results.values():
        values = _at(each["lengths"], each[key], lengths)
        intervals = _at(each["lengths"], each["interval"], lengths)
        columns.append([percent(v, i, whole) for v, i in zip(values, intervals, strict=True)])
    cells = zip(*columns, strict=True)
    rows = [(f"{length:,}", *row) for length, row in zip(lengths, cells, strict=True)]
    return Table(("length", *(_named(label, each) for label, each in results.items())), rows)


def _named(label: str, summary: Summary) -> str:
    """Return the name of an evaluation, and how questions were put if not as plain text."""
    return f"{label} (chat)" if summary["prompt"] == "chat" else label


def _lengths(results: Mapping[str, Summary]) -> list[int]:
    return sorted({length for each in results.values() for length in each["lengths"]})


def _at(own: Sequence[int], values: Sequence[Any], lengths: Sequence[int]) -> list[Any]:
    """Return the values of an evaluation at all lengths, None at those it does not have."""
    by_length = dict(zip(own, values, strict=True))
    return [by_length.get(length) for length in lengths]


def _too_short_rows(summary: Summary, columns: int) -> list[tuple[str, ...]]:
    """Return a row for each length that no case is short enough for."""
    return [
        (f"{each['length']:,}", f"too short: takes {each['needed']:,}", *[""] * (columns - 2))
        for each in summary["too_short"]
    ]
