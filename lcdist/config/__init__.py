"""Load TOML into one tree of frozen dataclasses, and write it back."""

from lcdist.config.build import ConfigError
from lcdist.config.dump import dump
from lcdist.config.load import load, parse

__all__ = ["ConfigError", "dump", "load", "parse"]
