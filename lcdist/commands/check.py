"""`lcdist check`: compare checkpoints, token folders and exports with their digests.

Needs no world of processes.
"""

import argparse
from pathlib import Path

from rich.console import Console

from lcdist.verify.at_rest import Checked, check_at_rest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folders."""
    parser.add_argument(
        "folders",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="run, checkpoint, import, export, adapter, or folder of tokens",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print one line for each folder with digests. Raise ValueError at the end for damaged ones."""
    console, damaged = Console(), 0
    for folder in arguments.folders:
        for checked in check_at_rest(folder):
            damaged += bool(checked.damage)
            console.print(line_of(checked), soft_wrap=True, highlight=False, markup=False)
            for text in (*checked.damage, *filter(None, [checked.note])):
                console.print(f"  {text}", soft_wrap=True, highlight=False, markup=False)
    if damaged:
        raise ValueError(
            f"{damaged} damaged folder{'s' * (damaged > 1)}, named above: restore the files, or "
            "make the folder again"
        )
    return 0


def line_of(checked: Checked) -> str:
    """Return the line about one folder."""
    state = "whole" if checked.files else "no digests were kept: nothing but sizes is known"
    if checked.damage:
        state = "DAMAGED"
    size = f"{checked.files} files, {checked.nbytes / 1e6:,.1f} MB" if checked.files else ""
    return f"{checked.folder}: {checked.kind}, {size + ', ' if size else ''}{state}"
