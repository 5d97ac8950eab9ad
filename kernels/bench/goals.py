"""Compare the rows of a folder of CSVs with the goals for one H200 (bf16, head_dim 128)."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gpu_harness import BACKWARD

from lcdist_kernels.full import FORCED

METHODS = ("full", "coca", "scca", "tensorized", "landmark", "lssar")
# What rows of one run have in common.
RUN = ("gpu", "date", "commit")
Row = dict[str, str]


class Goal(NamedTuple):
    """A goal and what was measured.

    asked: a lower bound if `least` is set, else an upper bound. measured: None if a row is missing.
    """

    what: str
    least: bool
    asked: float
    measured: float | None

    def verdict(self) -> str:
        """Return "met", "missed" with the distance, or "unmeasured"."""
        if self.measured is None:
            return "unmeasured"
        if (self.measured >= self.asked) == self.least or self.measured == self.asked:
            return "met"
        return f"missed by {100 * abs(self.measured / self.asked - 1):.1f} %"

    def facts(self) -> dict[str, Any]:
        """Return the goal as a table for the summary."""
        measured = "unmeasured" if self.measured is None else float(f"{self.measured:.4g}")
        asked = f"{'>=' if self.least else '<='} {self.asked:g}"
        return {
            "goal": self.what,
            "asked": asked,
            "measured": measured,
            "verdict": self.verdict(),
        }


class Found:
    """Find a GPU's latest rows with both times, by method, contender and length; head_dim 128."""

    def __init__(self, folder: Path, gpu: str) -> None:
        self._rows: dict[tuple[str, str, int], Row] = {}
        for method in METHODS:
            for row in read(folder / f"{method}.csv"):
                timed = row["fwd_ms"] and row["bwd_ms"]
                if timed and row["gpu"] == gpu and row["head_dim"] == "128":
                    self._rows[method, row["contender"], int(row["seqlen"])] = row

    def row(self, method: str, contender: str, seqlen: int) -> Row | None:
        return self._rows.get((method, contender, seqlen))

    def value(self, method: str, contender: str, column: str) -> float | None:
        """Return a column's value at 32k tokens."""
        row = self.row(method, contender, 32768)
        return float(row[column]) if row else None

    def ratio(self, one: Row | None, other: Row | None, of: Callable[[Row], float]) -> float | None:
        return of(one) / of(other) if one and other else None


def read(file: Path) -> list[Row]:
    """Read the rows of a CSV; none if the file does not exist."""
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def latest(rows: list[Row]) -> list[Row]:
    """Return the rows of the last timed row's GPU, date and commit; the later of repeated rows."""
    timed = [row for row in rows if row["fwd_ms"]]
    if not timed:
        return []
    rows = [row for row in timed if all(row[key] == timed[-1][key] for key in RUN)]
    keyed = {(row["contender"], row["head_dim"], row["seqlen"]): row for row in rows}
    return list(keyed.values())


def both_ms(row: Row) -> float:
    """Return the milliseconds of forward and backward."""
    return float(row["fwd_ms"]) + float(row["bwd_ms"])


def rate(row: Row) -> float:
    """Return the TFLOP/s over forward and backward."""
    forward = float(row["fwd_tflops"]) * float(row["fwd_ms"])
    return (1 + BACKWARD) * forward / both_ms(row)


def goals(folder: Path, gpu: str) -> list[Goal]:
    """Return all goals for one GPU."""
    found = Found(folder, gpu)
    full = found.row("full", "lcdist full", 32768)
    made = [
        Goal("full forward, TFLOP/s", True, 400, found.value("full", "lcdist full", "fwd_tflops")),
        Goal("full backward, TFLOP/s", True, 320, found.value("full", "lcdist full", "bwd_tflops")),
    ]
    libraries = [found.row("full", f"lcdist full impl={name}", 32768) for name in FORCED]
    block = max(filter(None, libraries), key=rate, default=None)
    share = found.ratio(block, found.row("full", "torch sdpa", 32768), rate)
    made.append(Goal("full by a library / torch sdpa, TFLOP/s", True, 0.95, share))
    coca, rotated = (found.row("coca", f"lcdist {m} rotated", 32768) for m in ("coca", "full"))
    share = found.ratio(coca, rotated, both_ms)
    made.append(Goal("coca / full, time, both rotated", False, 1.03, share))
    for pattern in ("fixed", "flow", "sda dilation=4", "longmixed"):
        row = found.row("scca", f"lcdist scca pattern={pattern}", 32768)
        what = f"scca {pattern} / full, TFLOP/s"
        made.append(Goal(what, True, 0.9, found.ratio(row, full, rate)))
    for method, most in (("landmark", 1.25), ("lssar", 1.6)):
        row = found.row(method, f"lcdist {method}", 32768)
        made.append(Goal(f"{method} / full, time", False, most, found.ratio(row, full, both_ms)))
    ours = found.row("tensorized", "lcdist tensorized modes=(512,)", 131072)
    # SDPA is compared because FlashAttention-2 is seldom installed; SDPA is the faster of the two.
    for rival in ("FlashAttention-2", "torch sdpa"):
        theirs = found.row("tensorized", rival, 131072) or found.row("full", rival, 131072)
        what = f"{rival} / tensorized, time at 128k"
        made.append(Goal(what, True, 15, found.ratio(theirs, ours, both_ms)))
    return made


def table(folder: Path, gpu: str) -> str:
    """Return the goals as text."""
    rows = [("goal (bf16, d 128, 32k unless said)", "asked", "measured", "verdict")]
    rows += [tuple(map(str, goal.facts().values())) for goal in goals(folder, gpu)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
