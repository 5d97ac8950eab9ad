"""`lcdist evaluate`: measure what a checkpoint does with long context."""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.table import Table

from lcdist.commands.arguments import add_checkpoint, add_overrides, check_output
from lcdist.commands.console import plain_console
from lcdist.distributed.mesh import end_world
from lcdist.evaluate.evaluation import Kept, evaluate_checkpoint
from lcdist.evaluate.unit_file import SUFFIX
from lcdist.report.comparison import write_evaluation
from lcdist.report.evaluation_sections import printed_tables
from lcdist.utils.errors import naming
from lcdist.utils.progress import TOKENS, progress_console, show_progress

COMPARED = ("before", "after")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint, a second one to compare with, and the output file."""
    add_checkpoint(parser)
    parser.add_argument("--before", type=Path, help="another checkpoint to compare with")
    parser.add_argument(
        "--output",
        type=Path,
        help="JSON file to write; beside it, what finished units measured: the same command goes "
        "on with those that are missing",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="measure again what finished units measured"
    )
    parser.add_argument("--html", type=Path, help="page to write, with tables and figures")
    add_overrides(parser)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate one or two checkpoints; rank 0 writes and prints the results."""
    check_output(arguments.output)
    check_output(arguments.html)
    if arguments.overwrite and not arguments.output:
        raise ValueError("--overwrite has no meaning without --output; leave it out")
    paths = [arguments.checkpoint]
    if arguments.before:
        paths.insert(0, arguments.before)
    output = arguments.output
    files = [None] * len(paths) if output is None else unit_files(output, len(paths))
    try:
        results = [_evaluate(*each, arguments) for each in zip(paths, files, strict=True)]
    finally:
        end_world()
    if not arguments.is_first_rank:
        return 0
    content = results[0]
    if len(results) > 1:
        content = {str(word): each for word, each in zip(COMPARED, results, strict=True)}
    if arguments.output:
        with naming(arguments.output):
            arguments.output.write_text(
                json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8"
            )
    if arguments.html:
        write_evaluation(content, str(arguments.checkpoint), arguments.html)
    for path, result in zip(paths, results, strict=True):
        title = f"{path} (attention: {result['attention']})"
        for found in printed_tables(result["measured"]):
            table = Table(*found.head, title=title)
            for row in found.rows:
                table.add_row(*row)
            plain_console().print(table)
    return 0


def unit_files(output: Path, count: int) -> list[Path]:
    """Return the files of finished units beside `output`, of one checkpoint or of two."""
    words = ("",) if count == 1 else tuple(f".{word}" for word in COMPARED)
    return [output.with_name(f"{output.name}{word}{SUFFIX}") for word in words]


def _evaluate(path: Path, file: Path | None, arguments: argparse.Namespace) -> dict[str, Any]:
    kept = None if file is None else Kept(file, arguments.overwrite)
    with show_progress(TOKENS, progress_console(), arguments.is_first_rank) as progress:
        return evaluate_checkpoint(path, arguments.overrides, progress, kept)
