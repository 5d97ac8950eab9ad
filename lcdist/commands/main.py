"""The command line: parse `lcdist COMMAND ...` and run one command.

Commands that need several processes (train, evaluate, generate, smoke) are started by
`launch/run.py` or torchrun. Without it they run alone, as a world of one process.
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
from lcdist.commands.arguments import DEBUG, Parser, UsageError, add_debug
from lcdist.commands.endings import end_with


@dataclass(frozen=True)
class Command:
    """One command. `module` defines `add_arguments(parser)` and `run(arguments) -> exit status`."""

    word: str
    module: str
    help: str


# Modules by name: only the module of the command that runs is imported, so that `lcdist --help` and
# `lcdist status` need no torch. `tests/test_floors.py` treats each entry as an import.
COMMANDS = (
    Command("init", "lcdist.commands.init", "write a configuration for a model and your GPUs"),
    Command("plan", "lcdist.commands.plan", "show what a run would be, without running it"),
    Command("methods", "lcdist.commands.methods", "list the attention methods"),
    Command("tokenize", "lcdist.commands.tokenize", "convert text to a folder of tokens"),
    Command("train", "lcdist.commands.stages", "train the model of a configuration"),
    Command("evaluate", "lcdist.commands.evaluate", "measure what a model does with long text"),
    Command("generate", "lcdist.commands.generate", "continue a text"),
    Command("convert", "lcdist.commands.convert", "convert to and from Hugging Face's format"),
    Command("check", "lcdist.commands.check", "compare what is on disk with its digests"),
    Command("status", "lcdist.commands.status", "show a run's progress, speed and restarts"),
    Command("report", "lcdist.commands.report", "write a page about a run, or compare several"),
    Command("extend", "lcdist.commands.extend", "extend a model's context, from text to report"),
    Command("claims", "lcdist.commands.claims", "lay papers' claims beside our own small models"),
    Command("probe", "lcdist.commands.probe", "time training steps at short lengths"),
    Command("smoke", "lcdist.commands.smoke", "check that a cluster trains and communicates"),
    Command("completion", "lcdist.commands.completion", "print a script that completes commands"),
    Command("run-folder", "lcdist.commands.run_folder", "print a run's folder, for a batch script"),
)


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; 2 if the user made a mistake."""
    words = sys.argv[1:] if words is None else words
    environment, debug = dict(os.environ), DEBUG in words
    try:
        arguments, module = _parse([word for word in words if word != DEBUG])
        arguments.environment = environment
        arguments.load_parsers = load_parsers
        arguments.is_first_rank = environment.get("RANK", "0") == "0"
        set_up_logging(arguments.is_first_rank)
        status = module.run(arguments)
        sys.stdout.flush()
        return status
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):
            return end_with(error, environment, debug)
        raise
    except (Exception, KeyboardInterrupt) as error:
        return end_with(error, environment, debug)


def load_parsers() -> list[tuple[Parser, str]]:
    """Return the parser of every command, with its help; imports all of them."""
    found = []
    for command in COMMANDS:
        parser = Parser(prog=command.word)
        import_module(command.module).add_arguments(parser)
        found.append((parser, command.help))
    return found


def parse_words(words: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of one command line; raise UsageError if argparse rejects it."""
    return _parse(sys.argv[1:] if words is None else words)[0]


def _parse(words: Sequence[str]) -> tuple[argparse.Namespace, ModuleType]:
    """Return the arguments and the module of the command."""
    parser = Parser(prog="lcdist", description="Train language models on long sequences.")
    parser.add_argument("--version", action="version", version=f"lcdist {__version__}")
    add_debug(parser)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    # No option before the command takes a value, so the command is the first plain word.
    chosen = next((word for word in words if not word.startswith("-")), None)
    module = None
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.word, help=command.help)
        if command.word == chosen:
            module = import_module(command.module)
            module.add_arguments(subparser)
            add_debug(subparser)
    arguments, late = parser.parse_known_args(words)
    # Before Python 3.12 argparse leaves over the overrides that follow an option.
    if late and ("overrides" not in arguments or any(word.startswith("-") for word in late)):
        told = f"unrecognized arguments: {' '.join(late)}"
        raise UsageError(f"{told}; see 'lcdist {chosen} --help'")
    if late:
        arguments.overrides += late
    assert module is not None, "argparse requires a command"
    return arguments, module


def set_up_logging(is_first_rank: bool) -> None:
    """Log to standard error: messages from rank 0, errors from the other ranks."""
    if sys.stderr.isatty():
        # Not at the top: `lcdist --help` does without rich.
        from rich.console import Console
        from rich.logging import RichHandler

        handler: logging.Handler = RichHandler(
            console=Console(stderr=True),
            show_path=False,
            show_level=False,
            log_time_format="%H:%M:%S",
        )
    else:
        # rich would cut lines of a file at 80 columns.
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("lcdist").setLevel(logging.INFO if is_first_rank else logging.ERROR)
