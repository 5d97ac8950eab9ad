"""`lcdist report`: write the report.html of a run folder."""

import argparse
from pathlib import Path

from lcdist.report.sections import write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the run folder."""
    parser.add_argument("folder", type=Path, help="run folder, or folder of the main job")


def run(arguments: argparse.Namespace) -> int:
    """Write the report and print its path."""
    print(write_report(arguments.folder))
    return 0
