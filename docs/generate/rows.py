"""Read the measured rows in kernels/bench/results that the tables are made of."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from docs.generate.repository import ROOT

BENCH = ROOT / "kernels" / "bench"
RESULTS = BENCH / "results"
# Programs of that folder import each other by name, as programs of one folder do.
if str(BENCH) not in sys.path:
    sys.path.append(str(BENCH))

import crossover  # noqa: E402
import goals  # noqa: E402

Row = dict[str, str]


@dataclass(frozen=True)
class Preset:
    """A method with the options that it was measured with.

    Attributes:
        method: Name of the method.
        words: Words that name the options.
        contender: Name of the rows of a GPU.
        options: Options that differ from the defaults.
    """

    method: str
    words: str
    contender: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Name of the preset in tables, as Markdown."""
        return f"`{self.method}` {self.words}".strip()


PRESETS = (
    Preset("full", "", "lcdist full"),
    Preset("coca", "", "lcdist coca rotated"),
    Preset("scca", "fixed", "lcdist scca pattern=fixed", {"pattern": "fixed"}),
    Preset("scca", "flow", "lcdist scca pattern=flow", {"pattern": "flow"}),
    Preset(
        "scca",
        "sda, dilation 4",
        "lcdist scca pattern=sda dilation=4",
        {"pattern": "sda", "dilation": 4},
    ),
    Preset("scca", "longmixed", "lcdist scca pattern=longmixed", {"pattern": "longmixed"}),
    Preset("tensorized", "modes 512", "lcdist tensorized modes=(512,)", {"modes": [512]}),
    Preset("landmark", "block size 64", "lcdist landmark", {"block_size": 64}),
    Preset(
        "landmark",
        "block size 64, top k 64",
        "lcdist landmark top_k=64",
        {"block_size": 64, "top_k": 64},
    ),
    Preset("lssar", "", "lcdist lssar"),
)
# Its rows stand with those of full attention; torch calls cuDNN there.
LIBRARY = Preset("full", "", "torch sdpa")


def timed(preset: Preset, folder: Path = RESULTS) -> dict[int, Row]:
    """Return the rows of a preset in the latest run of its method, by length."""
    rows = crossover.timed_rows(folder, preset.method)
    return {int(row["seqlen"]): row for row in rows if row["contender"] == preset.contender}


def faster_from(preset: Preset, folder: Path = RESULTS) -> str:
    """Return the length from which a preset is faster than the fastest dense library, in words."""
    rows = timed(preset, folder)
    if not rows:
        return "unmeasured"
    dense = crossover.fastest_dense(folder, next(iter(rows.values())))
    points = [
        crossover.Point(length, goals.both_ms(row) / dense[length])
        for length, row in rows.items()
        if length in dense
    ]
    return crossover.in_words(points)


def run_of(rows: list[Row]) -> str:
    """Return the machine, date, commit and versions of rows, each run once."""
    runs = dict.fromkeys(
        f"{row['gpu']}, {row['date']}, commit {row['commit']}, torch {row['torch']}, "
        f"triton {row['triton']}"
        for row in rows
    )
    return "; ".join(runs) or "unmeasured"


def read(name: str, folder: Path = RESULTS) -> list[Row]:
    """Return the rows of a file of results; none if it does not exist."""
    return goals.read(folder / name)
