"""Time of tensorized attention against full attention, from the committed benchmark rows."""

import csv
from collections.abc import Iterator
from pathlib import Path

FULL, TENSORIZED = "full", "tensorized"
# Of the contenders on a GPU.
_OWN = "lcdist "

Row = dict[str, str]
# Device with date and commit, contender, and tokens.
Key = tuple[str, str, int]


def tensorized_times(folder: Path) -> list[tuple[str, ...]]:
    """Return cells of a table: device, modes, tokens, both times in ms, and how often faster.

    Times are of forward and backward of attention alone, of one process. Both come from one run of
    one commit.

    Args:
        folder: the benchmark results; without them the table is empty.
    """
    times = dict(_times(folder))
    cells = []
    for (place, contender, seqlen), own in sorted(times.items()):
        base = times.get((place, FULL, seqlen))
        if contender.startswith(TENSORIZED) and base is not None:
            words = contender.removeprefix(TENSORIZED).strip()
            numbers = (f"{seqlen:,}", f"{base:,.1f}", f"{own:,.1f}", f"{base / own:.1f}")
            cells.append((place, f"`{words}`", *numbers))
    return cells


def _times(folder: Path) -> Iterator[tuple[Key, float]]:
    for name in (FULL, TENSORIZED):
        for row in _rows(folder / f"{name}.csv"):
            contender = row["contender"]
            if contender.startswith(_OWN) and row["fwd_ms"] and row["bwd_ms"]:
                own = contender.removeprefix(_OWN)
                yield _key(row, row["gpu"], own), float(row["fwd_ms"]) + float(row["bwd_ms"])
    for row in _rows(folder / "methods.csv"):
        if row["processes"] == "1":
            yield _key(row, row["device"], row["contender"]), float(row["ms"])


def _key(row: Row, device: str, contender: str) -> Key:
    return f"{device}, {row['date']}, {row['commit']}", contender, int(row["seqlen"])


def _rows(file: Path) -> list[Row]:
    if not file.exists():
        return []
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))
