"""Arguments that several commands have in common."""

import argparse
import difflib
import errno
import os
from pathlib import Path
from typing import Any, NoReturn

DEBUG = "--debug"


class UsageError(ValueError):
    """A command line that cannot be understood."""


class HelpFormatter(argparse.HelpFormatter):
    """Adds the default of every option that has one and does not name it itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        is_plain = isinstance(default, str | int | float) and not isinstance(default, bool)
        if not text or not action.option_strings or not is_plain or "default" in text:
            return text
        return text if default in ("", argparse.SUPPRESS) else f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """A parser that raises UsageError instead of ending the process: every rank has one."""

    def __init__(self, *words: Any, **options: Any) -> None:
        super().__init__(*words, **{"formatter_class": HelpFormatter, **options})

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Raise ArgumentError with the legal values, in the same words on every Python."""
        if action.choices is None or value in action.choices:
            return
        legal = [str(choice) for choice in action.choices]
        close = difflib.get_close_matches(str(value), legal, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        text = f"{value!r} is none of {', '.join(legal)}{hint}"
        raise argparse.ArgumentError(action, text)

    def error(self, message: str) -> NoReturn:
        """Raise the message as an error of one line."""
        raise UsageError(f"{message}; see '{self.prog} --help'")


def add_debug(parser: argparse.ArgumentParser) -> None:
    """Add the option that brings the traceback of a user's mistake; the caller looks for it."""
    parser.add_argument(
        DEBUG,
        action="store_true",
        default=argparse.SUPPRESS,
        help="print the traceback of an error, also of a mistake in the command",
    )


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the overrides of a configuration: any number of `section.key=value`."""
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.key=value",
        help="override a setting; lcdist/config/schema.py has all keys",
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add a configuration file and its overrides."""
    parser.add_argument("config", help="TOML file")
    add_overrides(parser)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the path of a checkpoint."""
    parser.add_argument(
        "checkpoint", type=Path, help="checkpoint, or run folder for its latest checkpoint"
    )


def check_output(path: Path | None) -> None:
    """Raise OSError before the work is done if `path`, if given, is no place for a file."""
    if path is None:
        return
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not path.parent.is_dir():
        number = errno.ENOTDIR if path.parent.exists() else errno.ENOENT
        raise OSError(number, os.strerror(number), str(path))
