"""`lcdist generate`: continue a text with the model of a checkpoint."""

import argparse
import sys
from pathlib import Path

from lcdist.commands.arguments import add_checkpoint, add_overrides
from lcdist.distributed.mesh import end_world
from lcdist.evaluate.loaded_model import generate_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint, the prompt, the sampling settings and the output file."""
    add_checkpoint(parser)
    parser.add_argument("--prompt", default="", help="text to continue (default: standard input)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the most likely token"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="text file to write")
    add_overrides(parser)


def run(arguments: argparse.Namespace) -> int:
    """Generate the text; rank 0 writes and prints it."""
    prompt = arguments.prompt or sys.stdin.read()
    try:
        text = generate_text(
            arguments.checkpoint,
            prompt,
            arguments.overrides,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            seed=arguments.seed,
        )
    finally:
        end_world()
    if not arguments.is_first_rank:
        return 0
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0
