"""`lcdist report`: write the report.html of a run, or one page about several and evaluations."""

import argparse
from pathlib import Path

from lcdist.commands.arguments import check_output
from lcdist.report.comparison import JSON, write_comparison
from lcdist.report.sections import write_report
from lcdist.utils.progress import BYTES, progress_console, show_progress

COMPARISON = "comparison.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the runs and the output."""
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="run folder, folder of the main job, or JSON file of 'lcdist evaluate'; several are "
        "compared on one page",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="page to write (default: report.html in the folder of one run, beside one JSON file, "
        f"else {COMPARISON})",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the page and print its path."""
    check_output(arguments.output)
    paths, output = arguments.runs, arguments.output
    one = paths[0] if len(paths) == 1 else None
    with show_progress(BYTES, progress_console()) as progress:
        if one is not None and one.suffix != JSON:
            written = write_report(one, output, progress)
        else:
            beside = Path(COMPARISON) if one is None else one.with_suffix(".html")
            written = write_comparison(paths, output or beside, progress)
    print(written)
    return 0
