"""`lcdist status`: show a run's progress, speed and restarts. Needs no torch."""

import argparse
from pathlib import Path

from rich.table import Table

from lcdist.commands.console import plain_console
from lcdist.rundir.status import describe, stage_folders


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the run folder."""
    parser.add_argument("folder", type=Path, help="run folder")


def run(arguments: argparse.Namespace) -> int:
    """Print one table for each run in the folder."""
    for folder in stage_folders(arguments.folder) or [arguments.folder]:
        table = Table(show_header=False, title=str(folder))
        for row in describe(folder):
            table.add_row(*row)
        plain_console().print(table)
    return 0
