"""The command line: parse `lcdist COMMAND ...` and run one command.

Commands that need several processes (train, evaluate, generate, smoke) are started by torchrun.
Without it they run alone, as a world of one process.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from lcdist import __version__
from lcdist.config.load import ConfigError
from lcdist.utils.errors import RankError, is_of_rank_zero, os_error_text


@dataclass(frozen=True)
class Command:
    """One command. `module` defines `add_arguments(parser)` and `run(arguments) -> exit status`."""

    word: str
    module: str
    help: str


# Modules by name: only the module of the command that runs is imported, so that `lcdist --help` and
# `lcdist status` need no torch. `tests/test_floors.py` treats each entry as an import.
COMMANDS = (
    Command("plan", "lcdist.commands.plan", "show what a run would be, without running it"),
    Command("methods", "lcdist.commands.methods", "list the attention methods"),
    Command("tokenize", "lcdist.commands.tokenize", "convert text to a folder of tokens"),
    Command("train", "lcdist.commands.stages", "train the model of a configuration"),
    Command("evaluate", "lcdist.commands.evaluate", "measure a checkpoint's perplexity by length"),
    Command("generate", "lcdist.commands.generate", "continue a text"),
    Command("convert", "lcdist.commands.convert", "convert to and from Hugging Face's format"),
    Command("check", "lcdist.commands.check", "compare what is on disk with its digests"),
    Command("status", "lcdist.commands.status", "show a run's progress, speed and restarts"),
    Command("report", "lcdist.commands.report", "write the report.html of a run folder"),
    Command("extend", "lcdist.commands.extend", "extend a model's context, from text to report"),
    Command("smoke", "lcdist.commands.smoke", "check that a cluster trains and communicates"),
    Command("run-folder", "lcdist.commands.run_folder", "print a run's folder, for a batch script"),
)
USER_ERROR = 2


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; 2 if the user made a mistake."""
    arguments, module = _parse(words)
    arguments.environment = dict(os.environ)
    arguments.is_first_rank = os.environ.get("RANK", "0") == "0"
    set_up_logging(arguments.is_first_rank)
    try:
        return module.run(arguments)
    except (ValueError, OSError, FloatingPointError) as error:
        rank = arguments.environment.get("RANK", "0")
        for line in error_lines(error, int(rank) if rank.isdecimal() else 0):
            print(line, file=sys.stderr)
        return USER_ERROR


def error_lines(error: Exception, rank: int) -> list[str]:
    """Return what a rank prints of an error; nothing if rank 0 prints the same.

    All ranks find the same mistakes of a user, but files and disks may differ between machines.
    """
    prefix = "configuration error" if isinstance(error, ConfigError) else "error"
    if rank:
        if not isinstance(error, RankError | OSError) or is_of_rank_zero(error):
            return []
        prefix = f"rank {rank}: {prefix}"
    text = os_error_text(error) if isinstance(error, OSError) else str(error)
    return [f"{prefix}: {line}" for line in text.splitlines() or [type(error).__name__]]


def parse_words(words: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of one command line; exit with status 2 if argparse rejects it."""
    return _parse(words)[0]


def _parse(words: Sequence[str] | None) -> tuple[argparse.Namespace, ModuleType]:
    """Return the arguments and the module of the command."""
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(
        prog="lcdist", description="Train language models on long sequences."
    )
    parser.add_argument("--version", action="version", version=f"lcdist {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    # No option before the command takes a value, so the command is the first plain word.
    chosen = next((word for word in words if not word.startswith("-")), None)
    module = None
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.word, help=command.help)
        if command.word == chosen:
            module = import_module(command.module)
            module.add_arguments(subparser)
    arguments, late = parser.parse_known_args(words)
    # Before Python 3.12 argparse leaves over the overrides that follow an option.
    if late and ("overrides" not in arguments or any(word.startswith("-") for word in late)):
        parser.error(f"unrecognized arguments: {' '.join(late)}")
    if late:
        arguments.overrides += late
    assert module is not None, "argparse requires a command"
    return arguments, module


def set_up_logging(is_first_rank: bool) -> None:
    """Log to standard error: messages from rank 0, errors from the other ranks."""
    # Not at the top: `lcdist --help` does without rich.
    from rich.console import Console
    from rich.logging import RichHandler

    handler = RichHandler(
        console=Console(stderr=True), show_path=False, show_level=False, log_time_format="%H:%M:%S"
    )
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("lcdist").setLevel(logging.INFO if is_first_rank else logging.ERROR)
