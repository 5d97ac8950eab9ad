"""Arguments that several commands have in common."""

import argparse
import errno
import os
from pathlib import Path


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the overrides of a configuration: any number of `section.key=value`."""
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")


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
