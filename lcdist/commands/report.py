"""`lcdist report`: write the report.html of a run folder."""

import argparse
from pathlib import Path

from lcdist.report.sections import write_report
from lcdist.utils.progress import BYTES, progress_console, show_progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the run folder."""
    parser.add_argument("folder", type=Path, help="run folder, or folder of the main job")


def run(arguments: argparse.Namespace) -> int:
    """Write the report and print its path."""
    with show_progress(BYTES, progress_console()) as progress:
        written = write_report(arguments.folder, progress=progress)
    print(written)
    return 0
