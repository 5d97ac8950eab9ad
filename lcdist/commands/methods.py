"""`lcdist methods`: list the attention methods as the README shows them."""

import argparse

from lcdist.attention import METHODS
from lcdist.attention.table import method_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command has no arguments."""


def run(arguments: argparse.Namespace) -> int:
    """Print the table of attention methods in Markdown."""
    print(method_table(METHODS.values()))
    return 0
