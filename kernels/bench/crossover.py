"""Find the length from which a method is faster than the fastest dense attention of a library.

    python kernels/bench/crossover.py [FOLDER]

Prints a Markdown table of the latest rows in FOLDER (results/ by default): one GPU, one date, one
commit. Forward and backward count together. Between two measured lengths the time ratio is taken to
be a power of the length.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from goals import METHODS, RUN, Row, both_ms, latest, read
from harness import RESULTS

HEAD_DIM = "128"
SHOWN = 32768
HEADER = ("contender", "fwd / bwd, ms", "TFLOP/s", "of dense", "faster than dense from")
HEADER += ("host, ms", "launches")


class Point(NamedTuple):
    """A method's time over the fastest dense library's at one length."""

    seqlen: int
    ratio: float


def crossover(points: Sequence[Point]) -> float | None:
    """Return the length from which on the ratio stays below 1; None if it does not at the longest.

    Returns the shortest measured length if the ratio is below 1 at all of them.
    """
    ordered = sorted(points)
    slower = [number for number, point in enumerate(ordered) if point.ratio >= 1]
    if not ordered or (slower and slower[-1] == len(ordered) - 1):
        return None
    if not slower:
        return ordered[0].seqlen
    left, right = ordered[slower[-1]], ordered[slower[-1] + 1]
    share = math.log(left.ratio) / (math.log(left.ratio) - math.log(right.ratio))
    return left.seqlen * (right.seqlen / left.seqlen) ** share


def in_words(points: Sequence[Point]) -> str:
    """Return the crossover as text: tokens, or a bound at the ends of what was measured."""
    if not points:
        return "unmeasured"
    found, lengths = crossover(points), [point.seqlen for point in points]
    if found is None:
        return f"none up to {max(lengths):,}"
    return f"{min(lengths):,} or less" if found == min(lengths) else f"{round(found, -2):,.0f}"


def fastest_dense(folder: Path, run: Row) -> dict[int, float]:
    """Return the milliseconds of the fastest library for full attention, by length.

    run: a row; only rows of its GPU, date and commit count.
    """
    found: dict[int, float] = {}
    for row in timed_rows(folder, "full"):
        if row["contender"] != "lcdist full" and all(row[key] == run[key] for key in RUN):
            length = int(row["seqlen"])
            found[length] = min(both_ms(row), found.get(length, math.inf))
    return found


def timed_rows(folder: Path, method: str) -> list[Row]:
    """Return a method's latest rows of head_dim 128 that have both times."""
    rows = latest(read(folder / f"{method}.csv"))
    return [row for row in rows if row["bwd_ms"] and row["head_dim"] == HEAD_DIM]


def line_of(rows: Sequence[Row], dense: dict[int, float]) -> list[str]:
    """Return the cells of one contender from its rows of all lengths."""
    shown = min(rows, key=lambda row: abs(math.log(int(row["seqlen"]) / SHOWN)))
    length = int(shown["seqlen"])
    points = [
        Point(int(row["seqlen"]), both_ms(row) / dense[int(row["seqlen"])])
        for row in rows
        if int(row["seqlen"]) in dense
    ]
    of_dense = f"{both_ms(shown) / dense[length]:.2f}" if length in dense else "unmeasured"
    at = "" if length == SHOWN else f" at {length:,}"
    return [
        f"{shown['contender']}{at}",
        f"{float(shown['fwd_ms']):.3g} / {float(shown['bwd_ms']):.3g}",
        f"{float(shown['fwd_tflops']):.0f} / {float(shown['bwd_tflops']):.0f}",
        of_dense,
        in_words(points),
        pair(shown, "host_ms"),
        pair(shown, "launches"),
    ]


def pair(row: Row, column: str) -> str:
    """Return a column of both passes; rows before it existed have none."""
    cells = [row.get(f"{name}_{column}") for name in ("fwd", "bwd")]
    return " / ".join(map(str, cells)) if all(cells) else "unmeasured"


def table(folder: Path) -> str:
    """Return the Markdown table; empty if nothing was timed."""
    lines, last = [], None
    for method in METHODS:
        by_contender: dict[str, list[Row]] = {}
        for row in timed_rows(folder, method):
            by_contender.setdefault(row["contender"], []).append(row)
            last = row
        lines += [line_of(rows, fastest_dense(folder, rows[0])) for rows in by_contender.values()]
    if last is None:
        return ""
    heads = f"{last['nheads']}:{last['nheads_kv']} heads of {HEAD_DIM}"
    above = f"{last['gpu']}, {last['date']}, commit {last['commit']}, {last['dtype']}, {heads}, "
    above += f"{SHOWN:,} tokens:"
    marks = ["---"] * len(HEADER)
    return "\n".join(
        [above, "", *(f"| {' | '.join(cells)} |" for cells in (HEADER, marks, *lines))]
    )


def main() -> int:
    """Print the table of a folder."""
    print(table(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS) or "no timed rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
