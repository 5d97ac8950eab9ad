"""Read what `lcdist evaluate` wrote, in all its forms, and check that it can be shown.

A file holds one evaluation; two under "before" and "after"; or, as `lcdist extend` writes it, the
perplexities of two. Earlier versions measured perplexity alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcdist.report.evaluation_sections import check_shown
from lcdist.report.formatting import finite
from lcdist.report.section import Summary
from lcdist.utils.json_file import check_types, read_json

AGAIN = "remove the file, or write it again by the command that made it"
_PAIR = ("before", "after")
# What is known of an evaluation besides its figures, by the key of the file and what it is called.
FACTS = {
    "checkpoint": "checkpoint",
    "step": "step",
    "attention": "attention",
    "tokens": "tokens asked for",
    "seed": "seed",
    "version": "lcdist",
}
_TYPES: Mapping[str, Any] = {"checkpoint": str, "step": int, "attention": str, "tokens": int}
_PERPLEXITIES: Mapping[str, Any] = {
    **{"lengths": list[int], "perplexity": list[float | None], "scored": list[int]},
}
OF_JOB: Mapping[str, Any] = {
    **{"lengths": list[int], "before": list[float | None], "after": list[float | None]},
    **{"attention": str, "tokens": int, "before_label": str, "after_label": str},
}


@dataclass(frozen=True)
class Evaluation:
    """One evaluation.

    Attributes:
        label: what it is called beside others; may be empty for the only one of a file.
        facts: values of the keys `FACTS`, as far as they are known.
        measured: the summary of each part, by name.
    """

    label: str
    facts: Mapping[str, Any]
    measured: Mapping[str, Summary]


def read_evaluations(path: Path) -> list[Evaluation]:
    """Return the evaluations in a file, one or two.

    Raises:
        ValueError: the file is damaged; names it and what to do.
        OSError: it cannot be read.
    """
    return evaluations_of(read_json(path, AGAIN), str(path))


def evaluations_of(table: Any, where: str) -> list[Evaluation]:
    """Return the evaluations in the content of a file.

    Args:
        table: the content.
        where: names the file, for messages.
    """
    if not isinstance(table, dict):
        raise ValueError(f"{where}: expected an object, got {type(table).__name__}; {AGAIN}")
    if is_of_job(table):
        return _of_job(table, where)
    if _PAIR[0] in table:
        return [_single(table.get(word), f"{where}: {word}", word) for word in _PAIR]
    return [_single(table, where, "")]


def is_of_job(table: Mapping[str, Any]) -> bool:
    """Return whether a file has the form of `lcdist extend`, or of none that is known."""
    return "checkpoint" not in table and not isinstance(table.get(_PAIR[0]), dict)


def _single(table: Any, where: str, label: str) -> Evaluation:
    check_types(table, _TYPES, where, AGAIN)
    if "measured" in table:
        check_types(table, {"measured": dict[str, dict]}, where, AGAIN)
        measured = table["measured"]
    else:
        measured = {"perplexity": _earlier(table, where)}
    _check_shown(measured, where)
    return Evaluation(label, {key: table[key] for key in FACTS if key in table}, measured)


def _earlier(table: Mapping[str, Any], where: str) -> Summary:
    """Return the summary of a file that an earlier version wrote."""
    check_types(table, _PERPLEXITIES, where, AGAIN)
    return _perplexities(*(table[key] for key in _PERPLEXITIES))


def _of_job(table: dict[str, Any], where: str) -> list[Evaluation]:
    for key in _PAIR:
        if isinstance(table.get(key), list):
            # Perplexity may overflow.
            table[key] = [finite(v) if isinstance(v, float) else v for v in table[key]]
    check_types(table, OF_JOB, where, AGAIN)
    count = len(table["lengths"])
    for key in _PAIR:
        if len(table[key]) != count or not count:
            raise ValueError(f"{where}: {key} has {len(table[key])} entries for {count} lengths")
    facts = {key: table[key] for key in FACTS if key in table}
    found = []
    for word in _PAIR:
        scored = [table["tokens"]] * len(table["lengths"])
        measured = {"perplexity": _perplexities(table["lengths"], table[word], scored)}
        _check_shown(measured, where)
        found.append(Evaluation(table[f"{word}_label"], facts, measured))
    return found


def _perplexities(
    lengths: Sequence[int], values: Sequence[float | None], scored: Sequence[int]
) -> Summary:
    """Return a summary without intervals."""
    intervals = [None] * len(lengths)
    return {"lengths": lengths, "perplexity": values, "interval": intervals, "scored": scored}


def _check_shown(measured: Mapping[str, Summary], where: str) -> None:
    """Raise ValueError if a part cannot be shown: its figures are not as they are written."""
    for name, summary in measured.items():
        try:
            check_shown(name, summary)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{where}: measured.{name} is not what 'lcdist evaluate' writes "
                f"({type(error).__name__}: {error}); {AGAIN}"
            ) from error
