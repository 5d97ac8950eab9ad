"""`lcdist evaluate`: measure a checkpoint's perplexity by length."""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.table import Table

from lcdist.commands.arguments import add_checkpoint, add_overrides, check_output
from lcdist.commands.console import plain_console
from lcdist.distributed.mesh import end_world
from lcdist.evaluate.evaluation import evaluate_checkpoint
from lcdist.report.evaluation_sections import printed_tables
from lcdist.utils.errors import naming
from lcdist.utils.progress import TOKENS, progress_console, show_progress

COMPARED = ("before", "after")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint, a second one to compare with, and the output file."""
    add_checkpoint(parser)
    parser.add_argument("--before", type=Path, help="another checkpoint to compare with")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    add_overrides(parser)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate one or two checkpoints; rank 0 writes and prints the results."""
    check_output(arguments.output)
    paths = [arguments.checkpoint]
    if arguments.before:
        paths.insert(0, arguments.before)
    try:
        results = [_evaluate(path, arguments) for path in paths]
    finally:
        end_world()
    if not arguments.is_first_rank:
        return 0
    if arguments.output:
        content = results[0] if len(results) == 1 else dict(zip(COMPARED, results, strict=True))
        with naming(arguments.output):
            arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for path, result in zip(paths, results, strict=True):
        title = f"{path} (attention: {result['attention']})"
        for found in printed_tables(result["measured"]):
            table = Table(*found.head, title=title)
            for row in found.rows:
                table.add_row(*row)
            plain_console().print(table)
    return 0


def _evaluate(path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    with show_progress(TOKENS, progress_console(), arguments.is_first_rank) as progress:
        return evaluate_checkpoint(path, arguments.overrides, progress)
