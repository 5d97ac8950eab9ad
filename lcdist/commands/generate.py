"""`lcdist generate`: continue a text with the model of a checkpoint."""

import argparse
import sys
from pathlib import Path

from lcdist.commands.arguments import add_checkpoint, add_overrides, check_output
from lcdist.config.fields import SEED
from lcdist.config.values import shown, text_problem
from lcdist.distributed.mesh import end_world
from lcdist.evaluate.loaded_model import generate_text
from lcdist.inference.sampling import Sampling
from lcdist.inference.text_stream import TextWatch
from lcdist.utils.errors import naming
from lcdist.utils.progress import TOKENS, progress_console, show_progress

MOST_TOKENS = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint, the prompt, the sampling settings and the output file."""
    add_checkpoint(parser)
    parser.add_argument("--prompt", default="", help="text to continue (default: standard input)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, help="limit of the continuation, in tokens"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the most likely token"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--output", type=Path, help="text file to write")
    add_overrides(parser)


def run(arguments: argparse.Namespace) -> int:
    """Generate the text; rank 0 writes and prints it."""
    _check(arguments)
    sampling = Sampling(arguments.temperature, arguments.seed)
    prompt, is_first = arguments.prompt or _standard_input(), arguments.is_first_rank
    try:
        with show_progress(TOKENS, progress_console(), is_first) as progress:
            text = generate_text(
                arguments.checkpoint,
                prompt,
                arguments.overrides,
                max_new_tokens=arguments.max_new_tokens,
                sampling=sampling,
                watch=TextWatch(progress, _print_piece if is_first else None),
            )
    finally:
        end_world()
    if not is_first:
        return 0
    print(flush=True)
    print(f"sampling: {sampling}", file=sys.stderr)
    if arguments.output:
        with naming(arguments.output):
            arguments.output.write_text(text + "\n", encoding="utf-8")
    return 0


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)


def _check(arguments: argparse.Namespace) -> None:
    """Raise ValueError if an option has an illegal value."""
    temperature, tokens, seed = arguments.temperature, arguments.max_new_tokens, arguments.seed
    if temperature != 0 and not 1e-3 <= temperature <= 1e3:
        raise ValueError(f"--temperature {temperature}: must be 0, or from 0.001 to 1000")
    if not 0 <= tokens <= MOST_TOKENS:
        raise ValueError(f"--max-new-tokens {tokens}: must be from 0 to {MOST_TOKENS:,}")
    if not 0 <= seed <= SEED.most:
        raise ValueError(f"--seed {seed}: must be from 0 to {SEED.most:,}")
    problem = text_problem(arguments.prompt)
    if problem:
        raise ValueError(f"--prompt {shown(arguments.prompt)}: {problem}")
    check_output(arguments.output)


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input: not UTF-8 text ({error.reason})") from error
