"""`lcdist generate`: continue texts with the model of a checkpoint."""

import argparse
import sys
from pathlib import Path

from lcdist.commands.arguments import add_checkpoint, add_overrides, check_output
from lcdist.config.fields import SEED
from lcdist.config.values import shown, text_problem
from lcdist.distributed.mesh import end_world
from lcdist.evaluate.continuation import generate_text
from lcdist.inference.sampling import Sampling
from lcdist.inference.settings import Figures, Generation
from lcdist.inference.text_stream import TextWatch
from lcdist.utils.errors import naming
from lcdist.utils.progress import TOKENS, progress_console, show_progress

MOST_TOKENS = 2**20
MOST_BLOCKS = 2**30
BETWEEN_TEXTS = "-" * 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint, the prompts, the sampling settings and the output file."""
    add_checkpoint(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="text to continue; may be given several times (default: standard input)",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, help="limit of a continuation, in tokens"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the most likely token"
    )
    parser.add_argument(
        "--top-k", type=int, help="choose from so many most likely tokens (default: all)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="choose from the most likely tokens that together have this probability",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="text of one token that ends a continuation; may be given several times",
    )
    parser.add_argument(
        "--piece", type=int, default=4096, help="tokens of a prompt that a rank reads at once"
    )
    parser.add_argument(
        "--device-blocks",
        type=int,
        metavar="BLOCKS",
        help="landmark attention with top_k: blocks of a text and key head on the device, the rest "
        "being in host memory (default: all on the device)",
    )
    parser.add_argument("--output", type=Path, help="text file to write")
    add_overrides(parser)


def run(arguments: argparse.Namespace) -> int:
    """Generate the texts; rank 0 writes and prints them."""
    _check(arguments)
    sampling = Sampling(arguments.temperature, arguments.seed, arguments.top_k, arguments.top_p)
    how = Generation(
        arguments.max_new_tokens,
        sampling,
        piece=arguments.piece,
        device_blocks=arguments.device_blocks,
    )
    is_first = arguments.is_first_rank
    # All ranks have the same standard input: what one reads, the others miss.
    prompts = arguments.prompt or [_standard_input() if is_first else ""]
    try:
        with show_progress(TOKENS, progress_console(), is_first) as progress:
            watch = TextWatch(progress, _print_piece if is_first else None)
            done = generate_text(
                arguments.checkpoint,
                prompts,
                arguments.overrides,
                how,
                stop=arguments.stop or (),
                watch=watch,
            )
    finally:
        end_world()
    if not is_first:
        return 0
    if len(prompts) == 1:
        print(flush=True)
    else:
        print(f"\n{BETWEEN_TEXTS}\n".join(done.texts), flush=True)
    print(f"sampling: {sampling}", file=sys.stderr)
    for line in _figures(done.figures):
        print(line, file=sys.stderr)
    if arguments.output:
        with naming(arguments.output):
            text = f"\n{BETWEEN_TEXTS}\n".join(done.texts)
            arguments.output.write_text(text + "\n", encoding="utf-8")
    return 0


def _figures(figures: Figures) -> list[str]:
    """Return lines that say what the texts took on this rank."""
    speed = figures.read / max(figures.reading_seconds, 1e-9)
    line = f"prompt: {figures.read:,} tokens, {speed:,.0f} tokens/s"
    if figures.steps:
        milliseconds = 1000 * figures.step_seconds / figures.steps
        line += f"; then {milliseconds:.1f} ms a token of each text"
    lines = [f"{line}; cache: {figures.cache_bytes / 2**20:.2f} MiB a text on the device"]
    swaps = figures.swaps
    if swaps is not None and swaps.chosen:
        hits = 100 * (1 - swaps.copied / swaps.chosen)
        copied = swaps.bytes_copied / max(1, figures.read + figures.steps)
        moved = max(1, swaps.copied + swaps.posted)
        lines.append(
            f"blocks: {hits:.1f} % of those read were on the device; {copied:,.0f} bytes a token "
            f"copied from host memory, {100 * swaps.posted / moved:.0f} % of them one layer ahead"
        )
    return lines


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)


def _check(arguments: argparse.Namespace) -> None:
    """Raise ValueError if an option has an illegal value."""
    temperature, top_p = arguments.temperature, arguments.top_p
    if temperature != 0 and not 1e-3 <= temperature <= 1e3:
        raise ValueError(f"--temperature {temperature}: must be 0, or from 0.001 to 1000")
    if not 0 < top_p <= 1:
        raise ValueError(f"--top-p {top_p}: must be more than 0, and at most 1")
    for name, value, least, most in (
        ("--max-new-tokens", arguments.max_new_tokens, 0, MOST_TOKENS),
        ("--top-k", arguments.top_k, 1, MOST_TOKENS),
        ("--seed", arguments.seed, 0, SEED.most),
        ("--piece", arguments.piece, 1, MOST_BLOCKS),
        ("--device-blocks", arguments.device_blocks, 1, MOST_BLOCKS),
    ):
        if value is not None and not least <= value <= most:
            raise ValueError(f"{name} {value}: must be from {least} to {most:,}")
    for prompt in arguments.prompt:
        problem = text_problem(prompt)
        if problem:
            raise ValueError(f"--prompt {shown(prompt)}: {problem}")
    check_output(arguments.output)


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input: not UTF-8 text ({error.reason})") from error
