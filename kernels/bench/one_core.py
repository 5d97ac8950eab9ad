"""The main function of a single-core benchmark: gate, measure, print, write."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date

import torch
from harness import commit, machine, write
from rich.console import Console
from rich.table import Table

from lcdist.distributed.mesh import end_world, start_world


def on_one_core() -> dict[str, object]:
    """Return the first columns of a row: date, commit, torch's version and the device."""
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "torch": torch.__version__,
        "device": f"{machine()}, one core",
    }


def show(rows: Sequence[dict[str, object]], columns: Sequence[str]) -> None:
    """Print some columns of rows as a table."""
    table = Table(*columns)
    for row in rows:
        table.add_row(*(str(row[key]) for key in columns))
    Console().print(table)


@dataclass(frozen=True)
class OneCore:
    """A single-core benchmark: its sizes, its gate, its measurement and its columns.

    gate(*sizes): returns an error, or None; after an error nothing is measured. rows(*sizes, runs):
    the rows to write. shown: the columns that are printed.
    """

    name: str
    doc: str | None
    sizes: Sequence[tuple[int, ...]]
    quick: Sequence[tuple[int, ...]]
    shown: Sequence[str]
    gate: Callable[..., str | None]
    rows: Callable[..., list[dict[str, object]]]

    def main(self) -> int:
        """Run the gate, measure and write; return 1 if the gate failed."""
        parser = argparse.ArgumentParser(
            description=self.doc, formatter_class=argparse.RawTextHelpFormatter
        )
        parser.add_argument(
            "--quick", action="store_true", help="small sizes, and no rows are written"
        )
        parser.add_argument("--runs", type=int, default=1, help="the fastest counts")
        words = parser.parse_args()
        torch.set_num_threads(1)
        torch.manual_seed(0)
        start_world(60)
        for sizes in self.quick if words.quick else self.sizes:
            red = self.gate(*sizes)
            if red:
                print(f"gate: {red}")
                return 1
            found = self.rows(*sizes, words.runs)
            show(found, self.shown)
            if not words.quick:
                write(self.name, found)
        end_world()
        return 0
