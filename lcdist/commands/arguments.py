"""Arguments that several commands have in common."""

import argparse
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
