"""The main of a benchmark of one core: gate, measure, print, write."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from harness import write
from rich.console import Console
from rich.table import Table

from lcdist.distributed.mesh import end_world, start_world


def show(rows: Sequence[dict[str, object]], columns: Sequence[str]) -> None:
    """Prints some columns of rows as a table."""
    table = Table(*columns)
    for row in rows:
        table.add_row(*(str(row[key]) for key in columns))
    Console().print(table)


@dataclass(frozen=True)
class OneCore:
    """A benchmark of one core: what it measures at which sizes, and how it is written.

    gate(*sizes): what is wrong, or None; on red nothing is measured. rows(*sizes, runs). shown: the
    columns that are printed.
    """

    name: str
    doc: str | None
    sizes: Sequence[tuple[int, ...]]
    quick: Sequence[tuple[int, ...]]
    shown: Sequence[str]
    gate: Callable[..., str | None]
    rows: Callable[..., list[dict[str, object]]]

    def main(self) -> int:
        """Gate, measure, write; status 1 on red."""
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
